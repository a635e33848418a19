"""Each protocol's perplexity is that of the tool it is named after, written out here as that tool
does it, with the whole model and all logits.
"""

import json
import math

import pytest
import torch
from tiny_llama import make_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from quantkit.evaluation.evaluate import evaluate
from quantkit.evaluation.preflight import EvaluationOptions
from quantkit.models.threads import one_thread

LENGTH = 32


class Whole:
    """The ordinary model; logits in float64 from its own hidden states."""

    def __init__(self, path):
        self.model, self.tokenizer = (
            AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval(),
            AutoTokenizer.from_pretrained(path),
        )

    def log_probabilities(self, tokens: list[int]) -> torch.Tensor:
        """[positions, vocabulary]"""
        with torch.inference_mode(), one_thread():
            hidden = self.model.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
            return (hidden.double() @ self.model.lm_head.weight.double().T).log_softmax(-1)


@pytest.fixture
def whole(llama):
    return Whole(llama)


def perplexity(llama, data, protocol, **options) -> dict:
    return evaluate(
        EvaluationOptions(
            llama, (), (str(data),), LENGTH, protocol=protocol, cache=False, **options
        )
    ).to_json()["base"]


def test_gptq_is_that_of_gptq(whole, llama, text):
    # IST-DASLab's gptq, llama.py: mean loss of each window times its length, over all lengths.
    tokens = whole.tokenizer(text.read_text()).input_ids
    count, nlls = 20, []
    for number in range(count):
        window = tokens[number * LENGTH : (number + 1) * LENGTH]
        logits = whole.log_probabilities(window)
        loss = torch.nn.functional.nll_loss(logits[:-1], torch.tensor(window[1:]))
        nlls.append(loss * LENGTH)
    expected = math.exp(sum(nlls) / (count * LENGTH))
    assert perplexity(llama, text, "gptq", max_tokens=count * LENGTH)[
        "perplexity"
    ] == pytest.approx(expected, rel=1e-6)


def test_llamacpp_is_that_of_llama_cpp(whole, llama, text):
    # llama.cpp, tools/perplexity: chunks of n_ctx, BOS in the place of the first token, and only
    # what the second half's positions predict.
    tokens = whole.tokenizer(text.read_text()).input_ids
    n_ctx, first, nll, count = LENGTH, LENGTH // 2, 0.0, 0
    for chunk in range(12):
        window = tokens[chunk * n_ctx : (chunk + 1) * n_ctx]
        window[0] = whole.tokenizer.bos_token_id
        logits = whole.log_probabilities(window)
        for position in range(first, n_ctx - 1):
            nll -= float(logits[position, window[position + 1]])
            count += 1
    assert count == 12 * (n_ctx - 1 - n_ctx // 2)
    assert perplexity(llama, text, "llamacpp", max_tokens=12 * LENGTH)[
        "perplexity"
    ] == pytest.approx(math.exp(nll / count), rel=1e-6)


def rolling_token_windows(tokens: list[int], prefix: int, length: int):
    """lm-evaluation-harness: get_rolling_token_windows with a context of one token, then
    make_disjoint_window. Yields (context, continuation).
    """
    first = min(length, len(tokens))
    windows, predicted = [([prefix, *tokens[: first - 1]], tokens[:first])], first
    while predicted < len(tokens):
        end = predicted + min(len(tokens) - predicted, length)
        windows.append((tokens[end - length - 1 : end - 1], tokens[predicted:end]))
        predicted = end
    return [
        (context[: len(context) - (len(continuation) - 1)], continuation)
        for context, continuation in windows
    ]


def test_lmeval_is_that_of_the_harness(whole, llama, tmp_path):
    texts = [make_text(words, seed) for seed, words in enumerate((3, 40, 25, 90))]
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    log_likelihood = 0.0
    for text in texts:
        for context, continuation in rolling_token_windows(
            whole.tokenizer.encode(text, add_special_tokens=False),
            whole.tokenizer.bos_token_id,
            LENGTH,
        ):
            read = [*context, *continuation][:-1][-LENGTH:]
            logits = whole.log_probabilities(read)[-len(continuation) :]
            log_likelihood += float(logits.gather(1, torch.tensor(continuation)[:, None]).sum())
    words, utf8_bytes = (
        sum(len(text.split()) for text in texts),
        sum(len(text.encode()) for text in texts),
    )
    base = perplexity(llama, data, "lmeval")
    assert base["perplexity"] == pytest.approx(math.exp(-log_likelihood / words), rel=1e-6)
    assert base["bits_per_byte"] == pytest.approx(
        -log_likelihood / utf8_bytes / math.log(2), rel=1e-6
    )
