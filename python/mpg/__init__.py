"""Text from several aligned language models at once, combined while decoding.

import mpg

model = mpg.load("path/to/base", attributes={"E": "path/to/adapter", "T": "path/to/another"})
print(model.generate("How was your weekend?", weights={"E": 1, "T": 1}).text)
"""

from mpg.frontend.custom_generate import custom_generate
from mpg.model import Model, load
from mpg.options import Options
from mpg.paper.methods import METHODS, answer
from mpg.results import STATISTICS, Result, Token

__version__ = "0.1.0"
__all__ = ["METHODS", "STATISTICS", "Model", "Options", "Result", "Token", "answer", "custom_generate", "load"]
