"""lm-evaluation-harness scores options on a server by its own client."""

from __future__ import annotations

import json

import pytest

from longer import long
from mpg.demo import MODELS
from mpg.evaluate.choices import accuracy, choose
from mpg.evaluate.tasks import Item

pytest.importorskip("lm_eval", reason="needs lm_eval")
OPTIONS = [("The weather is", " nice"), ("The weather is", " a plan for the trip"), ("How do you", " do?")]


def test_the_harness_scores_options_as_the_combined_law_has_them(served):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model, tokenizer = served.model, served.model.tokenizer
    harness = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="E=1,T=0.5", tokenizer=str(MODELS),
        tokenizer_backend="huggingface", batch_size=2, num_concurrent=1, max_length=256,
    )  # fmt: skip
    requests = [Instance("loglikelihood", {}, option, index) for index, option in enumerate(OPTIONS)]
    found = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, option), (logprob, is_greedy) in zip(OPTIONS, found, strict=True):
        prompt, whole = tokenizer(context)["input_ids"], tokenizer(context + option)["input_ids"]
        told = score(model, whole, {"E": 1, "T": 0.5})
        assert logprob == pytest.approx(sum(told[len(prompt) - 1 :]), abs=1e-6)
        assert not is_greedy
    prompts = [Instance("generate_until", {}, ("The weather is", {"until": ["."], "max_gen_toks": 6}), 0)]
    wanted = model.generate("The weather is", raw=True, weights="E=1,T=0.5", temperature=0, max_new_tokens=6).text
    assert harness.generate_until(prompts, disable_tqdm=True) == [wanted.split(".")[0]]


TASK = """
task: places
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{options}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
DOCUMENTS = [
    {"question": "The weather is", "options": [" nice", " a plan for the trip", " bad"], "answer": 0},
    {"question": "How do you", "options": [" do?", " like it?", " plan"], "answer": 1},
    {"question": "I would", "options": [" like", " go", " first"], "answer": 0},
    {"question": "What a", "options": [" day", " friend"], "answer": 1},
]


@long
def test_a_whole_task_of_the_harness_has_the_scores_of_the_combined_law(served, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    data = tmp_path / "data.json"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    (tmp_path / "places.yaml").write_text(TASK.replace("DATA", str(data)))
    model_args = {
        "base_url": f"{served.url}/v1/completions", "model": "E=1,T=0.5", "tokenizer": str(MODELS),
        "tokenizer_backend": "huggingface", "max_length": 256, "num_concurrent": 4,
    }  # fmt: skip
    found = simple_evaluate(
        "local-completions", model_args=model_args, tasks=["places"], batch_size=2, log_samples=True, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )  # fmt: skip
    tokenizer, num_right, num_right_by_byte = served.model.tokenizer, 0, 0
    samples = sorted(found["samples"]["places"], key=lambda sample: sample["doc_id"])
    for document, sample in zip(DOCUMENTS, samples, strict=True):
        question, sums = document["question"], []
        prompt = tokenizer(question)["input_ids"]
        for option in document["options"]:
            told = score(served.model, tokenizer(question + option)["input_ids"], {"E": 1, "T": 0.5})
            sums.append(sum(told[len(prompt) - 1 :]))
        got = [float(response[0][0]) for response in sample["resps"]]
        assert got == pytest.approx(sums, abs=1e-6)
        by_byte = [value / len(option) for value, option in zip(sums, document["options"], strict=True)]
        num_right += sums.index(max(sums)) == document["answer"]
        num_right_by_byte += by_byte.index(max(by_byte)) == document["answer"]
    scores = found["results"]["places"]
    assert scores["acc,none"] == num_right / len(DOCUMENTS)
    assert scores["acc_norm,none"] == num_right_by_byte / len(DOCUMENTS)


STEMS = [
    ("On a free day you", "EI", "go out", "stay in"),
    ("You trust", "TF", "what is proved", "what you feel"),
    ("You would rather", "EI", "talk", "read a long book"),
    ("A plan is", "JP", "made early", "made late"),
]


@long  # imports the harness' tasks
def test_the_harness_chooses_as_mpg_evaluate_does(served, tmp_path):
    """Its own multiple choice over the server: each option's log-probability, and the accuracies made of them."""
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    items = [
        Item(f"mcqa:{at}", "mcqa", "", stem, options=dict(zip(poles, options, strict=True)),
             about={"dimension": poles, "stem": stem})
        for at, (stem, poles, *options) in enumerate(STEMS)
    ]  # fmt: skip
    weights = {"E": 1, "T": 0.5}
    own = choose(served.model, items, weights)
    docs = [
        {
            "prompt": served.model.tokenizer.apply_chat_template(
                [{"role": "user", "content": item.about["stem"]}], tokenize=False, add_generation_prompt=True
            ),
            "options": [*item.options.values()],
        }
        for item in items
    ]
    (tmp_path / "docs.json").write_text(json.dumps(docs))
    task = {
        "task": "poles", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/docs.json"}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}", "target_delimiter": "",
        "doc_to_choice": "{{options}}", "doc_to_target": 0,
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    }  # fmt: skip
    harness = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions", model="E=1,T=0.5", tokenizer=str(MODELS),
        tokenizer_backend="huggingface", batch_size=2, num_concurrent=1, max_length=256,
    )  # fmt: skip
    found = simple_evaluate(harness, tasks=[task], bootstrap_iters=0, log_samples=True)
    for choice, sample in zip(own, sorted(found["samples"]["poles"], key=lambda of: of["doc_id"]), strict=True):
        logprobs = [float(response[0][0]) for response in sample["resps"]]
        assert logprobs == pytest.approx([*choice.logprobs.values()], abs=1e-6)
    firsts = [choice.chosen == choice.dimension[0] for choice in own]  # the harness' target is the first option
    assert found["results"]["poles"]["acc_norm,none"] == pytest.approx(sum(firsts) / len(firsts))
    assert accuracy(own, "E")["E"] == sum(firsts[::2]) / 2
    sums = [max(choice.logprobs, key=choice.logprobs.get) == choice.dimension[0] for choice in own]
    assert found["results"]["poles"]["acc,none"] == pytest.approx(sum(sums) / len(sums))


def score(model, token_ids, weights):
    """log p of every token but the first under the geometric target, by one model after the other."""
    import torch

    from mpg.paper.scoring import token_logprobs

    every = torch.tensor([list(range(model.models.vocab_size))])
    told = []
    for end in range(1, len(token_ids)):
        prompts = [token_ids[:end]] * every.shape[1]
        rows = token_logprobs(model.models, ("base", *weights), prompts, every.T.tolist())[:, :, 0]
        ratios = torch.tensor(list(weights.values()), dtype=rows.dtype)[:, None] * (rows[1:] - rows[0])
        told.append((rows[0] + ratios.sum(0)).log_softmax(0)[token_ids[end]].item())
    return told
