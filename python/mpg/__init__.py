"""Text from several aligned language models at once, combined while decoding.

import mpg

model = mpg.load("path/to/base", attributes={"E": "path/to/adapter", "T": "path/to/another"})
print(model.generate("How was your weekend?", weights={"E": 1, "T": 1}).text)
"""

TYPE_CHECKING = False  # which type checkers take for True; the module typing is one more wait

if TYPE_CHECKING:
    from mpg.context import Context
    from mpg.decode import STATISTICS
    from mpg.frontend.custom_generate import custom_generate
    from mpg.model import Model, load
    from mpg.options import Options
    from mpg.paper.methods import METHODS, answer
    from mpg.results import Result, Token, Trace
else:
    # each is imported when it is first asked for, so that `mpg --help` need not wait for torch
    _HOMES = {
        "Context": "context", "custom_generate": "frontend.custom_generate", "Model": "model", "load": "model",
        "Options": "options",
        "METHODS": "paper.methods", "answer": "paper.methods", "STATISTICS": "decode", "Result": "results",
        "Token": "results", "Trace": "results",
    }  # fmt: skip

    def __getattr__(name):
        if name not in _HOMES:
            raise AttributeError(f"module 'mpg' has no attribute {name!r}")
        from importlib import import_module

        globals()[name] = value = getattr(import_module(f"mpg.{_HOMES[name]}"), name)
        return value

    def __dir__():
        return sorted({*globals(), *_HOMES})


__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "STATISTICS",
    "Context",
    "Model",
    "Options",
    "Result",
    "Token",
    "Trace",
    "answer",
    "custom_generate",
    "load",
]
