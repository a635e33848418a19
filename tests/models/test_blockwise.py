"""A model run block by block computes what its ordinary forward computes, bit for bit, with one
block in memory.
"""

import gc
import tempfile
import threading
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    ARCHITECTURES,
    HANDING_ON,
    SHARING_BLOCKS,
    make_batches,
    make_model,
    open_blockwise,
    ordinary_hidden_states,
)

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.models import block_stack
from quantkit.models.block_inputs import BlockInputs, InputRecord
from quantkit.models.blockwise import BlockStep, BlockwiseModel
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.skeleton import StoredWeights, build_skeleton
from quantkit.models.threads import each_batch, one_thread

# Two alike, one of another length between them, one of a single token.
BATCHES = make_batches((2, 24), (1, 17), (2, 24), (3, 1))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """stored(kind) → the directory of a tiny model and the model; made once."""
    made = {}

    def get(kind: str):
        if kind not in made:
            directory = tmp_path_factory.mktemp("tiny") / kind
            made[kind] = directory, make_model(directory, kind)
        return made[kind]

    return get


def run_blockwise(
    blockwise: BlockwiseModel, batches=BATCHES, memory=None, prefetch=None, threads=1, cache=None
) -> list[torch.Tensor]:
    """Final hidden states of each batch."""
    directory = tempfile.TemporaryDirectory()
    states = HiddenStates(memory, Path(directory.name))

    def run(step: BlockStep) -> None:
        assert any(Path(directory.name).iterdir()) == (memory == 0)
        for _ in each_batch(step.advance, step.walk.batches, CPU, threads):
            pass

    try:
        blockwise.walk(dict(enumerate(batches)), states, run, cache=cache, prefetch=prefetch)
        blockwise.load_outer(with_head=False)
        return [
            blockwise.finish(tokens, states.get(number), cache)
            for number, tokens in enumerate(batches)
        ]
    finally:
        states.close()
        directory.cleanup()


def assert_equal(one, other) -> None:
    assert len(one) == len(other)
    for first, second in zip(one, other):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)


def damaged(directory, tmp_path, change):
    """A checkpoint like the one in `directory` after `change` of its dict of tensors."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    return tmp_path


# ---- The same bits.


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_blocks_in_turn_give_the_bits_of_the_ordinary_forward(stored, kind):
    directory, model = stored(kind)
    blockwise = open_blockwise(directory)
    assert not blockwise.unexpected
    assert_equal(run_blockwise(blockwise), ordinary_hidden_states(model, BATCHES))


def test_blocks_that_run_each_others_weights_run_them(tmp_path):
    """Zamba 2's: three attentions of which two are stored."""
    model = make_model(tmp_path, "zamba2", **SHARING_BLOCKS)
    blockwise = open_blockwise(tmp_path)
    assert blockwise.shared and all(
        ".4.shared_transformer." in target and ".1.shared_transformer." in source
        for target, source in blockwise.shared.items()
    )
    assert_equal(run_blockwise(blockwise), ordinary_hidden_states(model, BATCHES))
    with pytest.raises(
        CheckpointError,
        match="runs the weights of .* again in .*; export it in a scheme that needs no calibration",
    ):
        blockwise.require_unshared()


LONGCAT = {
    "num_layers": 2,
    "num_hidden_layers": 4,
    "ffn_hidden_size": 96,
    "expert_ffn_hidden_size": 32,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "moe_topk": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "qk_head_dim": 32,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}


def test_blocks_of_several_attentions_are_counted_as_blocks(tmp_path):
    """LongCat's hidden layers are twice its blocks."""
    model = make_model(tmp_path, "longcat_flash", **LONGCAT)
    assert open_blockwise(tmp_path).block_count == 2
    assert_equal(run_blockwise(open_blockwise(tmp_path)), ordinary_hidden_states(model, BATCHES))


@pytest.mark.parametrize("kind", HANDING_ON)
def test_what_a_block_hands_on_beside_hidden_states_reaches_the_next(kind, tmp_path):
    model = make_model(tmp_path, kind, **HANDING_ON[kind])
    blockwise = open_blockwise(tmp_path)
    assert_equal(run_blockwise(blockwise, threads=2), ordinary_hidden_states(model, BATCHES))
    assert blockwise.has_side_outputs


def test_a_block_does_not_run_before_the_one_that_hands_on_to_it(tmp_path):
    make_model(tmp_path, "zaya", **HANDING_ON["zaya"])
    blockwise = open_blockwise(tmp_path)
    with pytest.raises(CheckpointError, match="an earlier block, which hasn't run"):
        blockwise.walk(
            {0: BATCHES[0]}, HiddenStates(), lambda step: step.advance(0), restore=lambda walk: 1
        )


def test_hidden_states_that_rwkv_halves_between_blocks_are_not_halved_here(tmp_path):
    """Nor are the weights that it halves to match, so that the end is the same but for what norms
    add to a variance.
    """
    model = make_model(tmp_path, "rwkv", torch.float32, num_hidden_layers=3, rescale_every=1)
    for ours, theirs in zip(
        run_blockwise(open_blockwise(tmp_path)), ordinary_hidden_states(model, BATCHES)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "kind",
    [
        "llama",
        "gemma3_text",
        "qwen3_moe",
        "gpt2",
        "bloom",
        "bamba",
        "mamba2",
        "qwen3_next",
        "gemma3n_text",
    ],
)
def test_files_threads_and_prefetch_change_no_bit(stored, kind):
    directory, model = stored(kind)
    assert_equal(
        run_blockwise(open_blockwise(directory), memory=0, prefetch=True, threads=3),
        ordinary_hidden_states(model, BATCHES),
    )


def test_batches_of_many_lengths_are_told_apart(stored):
    directory, model = stored("mistral")
    batches = make_batches(
        *[(1 + number % 3, length) for number, length in enumerate((3, 9, 8, 7, 3, 30, 9, 64, 2))]
    )
    assert_equal(
        run_blockwise(open_blockwise(directory), batches, threads=2),
        ordinary_hidden_states(model, batches),
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_the_number_of_threads_changes_no_bit(stored, kind):
    directory, _ = stored(kind)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(run_blockwise(open_blockwise(directory), threads=threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert_equal(results[0], results[1])
    assert_equal(results[0], results[2])


def test_a_float32_model_without_a_dtype_in_its_config_runs_in_float32(tmp_path):
    model = make_model(tmp_path, "llama", torch.float32)
    config = (tmp_path / "config.json").read_text().replace('"dtype": "float32",', "")
    (tmp_path / "config.json").write_text(config)
    assert "dtype" not in config
    assert_equal(run_blockwise(open_blockwise(tmp_path)), ordinary_hidden_states(model, BATCHES))


@pytest.mark.parametrize("tie", [True, False])
def test_logits_are_those_of_the_ordinary_model_with_the_embedding_tied_or_not(tmp_path, tie):
    model = make_model(tmp_path, "llama", tie_word_embeddings=tie)
    blockwise = open_blockwise(tmp_path)
    hidden = run_blockwise(blockwise)
    head, embedding = (
        blockwise.model.get_output_embeddings(),
        blockwise.model.get_input_embeddings(),
    )
    blockwise.free_outer()
    assert head.weight.is_meta and embedding.weight.is_meta
    blockwise.load_outer(with_head=True)
    assert (head.weight is embedding.weight) == tie
    with one_thread(), torch.inference_mode():
        assert_equal(
            [head(states) for states in hidden],
            [model(input_ids=tokens).logits for tokens in BATCHES],
        )


def test_an_untied_head_stays_on_disk_until_it_is_asked_for(stored):
    blockwise = open_blockwise(stored("llama")[0])
    blockwise.load_outer(with_head=False)
    assert blockwise.model.lm_head.weight.is_meta
    assert not blockwise.model.model.embed_tokens.weight.is_meta


# ---- Memory.


def parameters_in_memory(blockwise: BlockwiseModel) -> set[str]:
    return {name for name, parameter in blockwise.model.named_parameters() if not parameter.is_meta}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_only_one_blocks_weights_are_in_memory(stored, kind):
    blockwise = open_blockwise(stored(kind)[0])
    assert not parameters_in_memory(blockwise)
    blockwise.load_outer(with_head=True)
    assert parameters_in_memory(blockwise) == {
        name
        for name, _ in blockwise.model.named_parameters()
        if not name.startswith("model.layers.")
    }
    blockwise.free_outer()
    for number in range(blockwise.block_count):
        with blockwise.block(number) as block:
            assert parameters_in_memory(blockwise) == {
                f"model.layers.{number}.{name}" for name, _ in block.named_parameters()
            }
            held = [weakref.ref(parameter) for parameter in block.parameters()]
        del block
        gc.collect()
        assert not parameters_in_memory(blockwise)
        assert not any(reference() is not None for reference in held)


class _Watched(StoredWeights):
    """Tells which block's weights were read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.read_of = {number: threading.Event() for number in range(3)}

    def read(self, name: str) -> torch.Tensor:
        if name.startswith("model.layers."):
            self.read_of[int(name.split(".")[2])].set()
        return super().read(name)


@pytest.mark.parametrize("prefetch", [True, False])
def test_prefetch_reads_the_next_block_and_no_further(tmp_path, prefetch):
    make_model(tmp_path, "llama", num_hidden_layers=3)
    checkpoint = Checkpoint.open(tmp_path)
    weights = _Watched(checkpoint)
    blockwise = BlockwiseModel(build_skeleton(checkpoint), weights, str(tmp_path))
    with blockwise.block(0, prefetch) as block:
        assert not any(parameter.is_meta for parameter in block.parameters())
        assert weights.read_of[1].wait(10 if prefetch else 0.2) == prefetch
        assert not weights.read_of[2].wait(0.2)
    blockwise.loader.close()


def test_equal_masks_and_position_embeddings_are_kept_once(stored):
    blockwise = open_blockwise(stored("gemma3_text")[0])

    def tensors(call: BlockInputs) -> list[torch.Tensor]:
        values = [*call.arguments, *call.keywords.values()]
        return [
            item
            for value in values
            for item in (value if isinstance(value, tuple) else [value])
            if isinstance(item, torch.Tensor)
        ]

    def check(step: BlockStep) -> None:
        first, shorter, again = (tensors(step.inputs(batch)) for batch in range(3))
        assert len(first) >= 3  # a mask, cosines and sines
        assert all(one is other for one, other in zip(first, again))
        assert not any(one is other for one, other in zip(first, shorter))
        with torch.inference_mode():
            for batch in step.walk.batches:
                step.advance(batch)

    blockwise.walk(dict(enumerate(BATCHES)), HiddenStates(), check)


# ---- What is refused, before anything runs.


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ],
)
def test_a_missing_weight_is_named(stored, tmp_path, name):
    broken = damaged(stored("llama")[0], tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"lacks the weight {name}"):
        open_blockwise(broken)


@pytest.mark.parametrize("leaves", [("w1",), ("w2",), ("w1", "w2", "w3")])
def test_a_missing_expert_is_refused_before_its_block_has_its_turn(stored, tmp_path, leaves):
    names = [f"model.layers.1.block_sparse_moe.experts.2.{leaf}.weight" for leaf in leaves]
    broken = damaged(
        stored("mixtral")[0], tmp_path, lambda tensors: [tensors.pop(name) for name in names]
    )
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*experts"):
        open_blockwise(broken)


@pytest.mark.parametrize(
    "kind, name, shape",
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", (64, 63)),
        ("llama", "model.norm.weight", (63,)),
        ("mixtral", "model.layers.1.block_sparse_moe.gate.weight", (5, 64)),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w1.weight", (96, 63)),
    ],
)
def test_a_wrong_shape_is_refused_before_its_block_has_its_turn(
    stored, tmp_path, kind, name, shape
):
    broken = damaged(
        stored(kind)[0],
        tmp_path,
        lambda tensors: tensors.update({name: torch.zeros(shape, dtype=torch.bfloat16)}),
    )
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        open_blockwise(broken)


def test_a_tensor_that_the_model_has_no_place_for_is_listed(stored, tmp_path):
    odd = damaged(
        stored("llama")[0],
        tmp_path,
        lambda tensors: tensors.update({"model.layers.1.adapter.weight": torch.zeros(3)}),
    )
    assert open_blockwise(odd).unexpected == ["model.layers.1.adapter.weight"]


def test_blocks_that_hand_on_more_than_is_known_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(block_stack, "TEXT_RETURNS", block_stack.TEXT_RETURNS[:-1])
    make_model(tmp_path, "rwkv")
    blockwise = open_blockwise(tmp_path)
    blockwise.load_outer(with_head=False)
    with pytest.raises(
        CheckpointError, match="RwkvForCausalLM can't be run block by block: "
    ) as refusal:
        blockwise.capture(BATCHES[0])
    assert "\n" not in str(refusal.value)


def test_a_forward_that_skips_blocks_is_refused(stored):
    blockwise = open_blockwise(stored("llama")[0])
    blockwise.load_outer(with_head=False)
    blockwise.model.model.config.num_hidden_layers = 1
    with pytest.raises(CheckpointError, match="its forward calls 1 of 2 blocks"):
        blockwise.capture(BATCHES[0])


def test_a_block_that_is_called_without_hidden_states_is_refused():
    with pytest.raises(CheckpointError, match="without hidden states, only with tokens, mask"):
        InputRecord(torch.Size((1, 2))).arrive((), {"tokens": None, "mask": None})


def test_a_refused_forward_leaves_the_blocks_in_place(stored, monkeypatch):
    directory, model = stored("llama")
    blockwise = open_blockwise(directory)
    blockwise.load_outer(with_head=False)
    with monkeypatch.context() as patch:
        patch.setattr(type(blockwise.model.model), "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            blockwise.capture(BATCHES[0])
    assert_equal(run_blockwise(blockwise), ordinary_hidden_states(model, BATCHES))


# ---- Tensors on disk.


def test_merged_experts_tell_their_tensors_in_the_order_of_the_experts(tmp_path):
    make_model(tmp_path, "mixtral", num_hidden_layers=1, num_local_experts=11)
    blockwise = open_blockwise(tmp_path)
    prefix = "model.layers.0.block_sparse_moe.experts"
    gate_up, down = (
        blockwise.sources(f"model.layers.0.mlp.experts.{leaf}")
        for leaf in ("gate_up_proj", "down_proj")
    )
    assert gate_up.lists == tuple(
        tuple(f"{prefix}.{expert}.{leaf}.weight" for expert in range(11)) for leaf in ("w1", "w3")
    )
    assert down.lists == (tuple(f"{prefix}.{expert}.w2.weight" for expert in range(11)),)


def test_a_renamed_and_a_plain_parameter_tell_their_one_tensor(stored):
    blockwise = open_blockwise(stored("mixtral")[0])
    assert blockwise.sources("model.layers.0.mlp.gate.weight").lists == (
        ("model.layers.0.block_sparse_moe.gate.weight",),
    )
    assert blockwise.sources("model.norm.weight").lists == (("model.norm.weight",),)
    assert blockwise.sources("model.nothing.weight") is None
