"""What is recorded while blocks run is what hooks on an ordinary forward see."""

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from tiny_models import (
    ARCHITECTURES,
    make_batches,
    make_model,
    open_blockwise,
    ordinary_hidden_states,
)
from torch import nn

from quantkit.calibration.hooks import (
    EXPERTS_IMPLEMENTATION,
    BlockRecorder,
    ObservingCache,
    register_observing_experts,
)
from quantkit.calibration.observers import HELD_OUT, BlockStatistics, InputObserver
from quantkit.errors import CalibrationError
from quantkit.models.blockwise import BlockStep
from quantkit.models.distributed import Ranks
from quantkit.models.hidden_states import HiddenStates
from quantkit.models.threads import each_batch, one_thread

BATCHES = make_batches((2, 24), (1, 17), (2, 24))
# The dtype of what adds up or is a maximum to the last bit, whatever the order.
EXACT = ("channel_amax", "histogram", "token_histogram", "extremes", "first_extremes", "counts")
TOLD = ("mixtral", "qwen3_moe", "gpt_oss")  # whose forward transformers selects by name
EXPERT_KINDS = (*TOLD, "llama4_text")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """stored(kind) → the directory of a tiny model and the model, whose experts run as `eager`;
    made once.
    """
    made = {}
    register_observing_experts()

    def get(kind: str):
        if kind not in made:
            directory = tmp_path_factory.mktemp("tiny") / kind
            model = make_model(directory, kind)
            if kind in TOLD:
                model.set_experts_implementation("eager")
            made[kind] = directory, model
        return made[kind]

    return get


class Recorded:
    """A tiny model run block by block: each batch's statistics of each block, and the final hidden
    states.
    """

    def __init__(
        self,
        directory,
        batches=BATCHES,
        threads=1,
        cache=None,
        quarters=(0, 0, 0),
        earlier=None,
        **options,
    ) -> None:
        blockwise, states = (
            open_blockwise(directory, experts_implementation=EXPERTS_IMPLEMENTATION),
            HiddenStates(),
        )
        cache = cache or ObservingCache()
        self.by_batch, self.recorders = [], []

        def record(step: BlockStep) -> None:
            recorder = BlockRecorder(blockwise, step.number, step.block, **options)

            def work(batch: int) -> BlockStatistics:
                with recorder.batch(
                    batches[batch].shape, quarters[batch], earlier or {}
                ) as statistics:
                    step.advance(batch)
                return statistics

            self.by_batch.append(
                list(each_batch(work, step.walk.batches, blockwise.device, threads))
            )
            recorder.close()
            self.recorders.append(recorder)

        walk = blockwise.walk(dict(enumerate(batches)), states, record, cache=cache)
        self.output = [final for _, final in walk.finish(with_head=False)]

    def block(self, number: int) -> BlockStatistics:
        return merged(self.by_batch[number])

    def inputs(self) -> dict[str, InputObserver]:
        """Every Linear's observer, by the Linear's name."""
        found = {}
        for number in range(len(self.by_batch)):
            statistics = self.block(number)
            found |= {
                linear: observer
                for name, observer in statistics.inputs.items()
                for linear in statistics.linears[name]
            }
        return found


def merged(parts) -> BlockStatistics:
    """The statistics of several, which stay as they are."""
    total = BlockStatistics()
    for part in parts:
        clone = BlockStatistics()
        for name, observer in part.inputs.items():
            clone.inputs[name] = InputObserver.from_tensors(name, observer.tensors(name))
            clone.linears[name] = list(part.linears[name])
        clone.heads = {key: type(head)(head.amax.clone()) for key, head in part.heads.items()}
        clone.experts = {name: counts.clone() for name, counts in part.experts.items()}
        total.merge(clone)
    return total


def seen_by_hooks(
    model: nn.Module, modules: dict[str, nn.Module], batches=BATCHES
) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """The arguments of each module in an ordinary forward, batch by batch."""
    seen = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(
            lambda _, arguments, name=name: seen[name].append(arguments)
        )
        for name, module in modules.items()
    ]
    ordinary_hidden_states(model, batches)
    for handle in handles:
        handle.remove()
    return seen


def assert_saw(observer: InputObserver, first: torch.Tensor, others: torch.Tensor) -> None:
    """first, others: all rows of first and of other positions, [tokens, features]."""
    first, others = first.float(), others.float()
    assert observer.counts[:2].tolist() == [len(others), len(first)]
    if len(others):
        assert torch.equal(observer.channel_amax, others.abs().amax(0))
        assert observer.amax == others.abs().max()
        extremes = torch.stack([observer.extremes[:, 0].amin(), observer.extremes[:, 1].amax()])
        assert torch.equal(extremes, torch.stack(others.aminmax()))
    if len(first):
        assert torch.equal(observer.first_extremes, torch.stack(first.aminmax()))
    assert observer.histogram.sum() == others.numel()
    torch.testing.assert_close(
        observer.channel_sum_of_squares, others.double().square().sum(0), rtol=1e-6, atol=0
    )


def assert_same(one: BlockStatistics, other: BlockStatistics) -> None:
    """Equal to the last bit, but for sums of floating-point numbers."""
    assert one.inputs.keys() == other.inputs.keys()
    assert {name: set(linears) for name, linears in one.linears.items()} == {
        name: set(linears) for name, linears in other.linears.items()
    }
    for name, observer in one.inputs.items():
        for field in EXACT:
            assert torch.equal(getattr(observer, field), getattr(other.inputs[name], field)), (
                name,
                field,
            )
        torch.testing.assert_close(
            observer.channel_sum_of_squares,
            other.inputs[name].channel_sum_of_squares,
            rtol=1e-12,
            atol=0,
        )
    for ours, theirs in ((one.heads, other.heads), (one.experts, other.experts)):
        assert ours.keys() == theirs.keys()
    assert all(torch.equal(head.amax, other.heads[key].amax) for key, head in one.heads.items())
    assert all(torch.equal(counts, other.experts[name]) for name, counts in one.experts.items())


# ---- Linears.


def linears_of_blocks(model: nn.Module) -> dict[str, nn.Module]:
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "opt", "gpt_neox", "phi3", "deepseek_v3", "mamba2"]
)
def test_each_linears_statistics_are_those_of_hooks_on_an_ordinary_forward(stored, kind):
    directory, model = stored(kind)
    model.config._experts_implementation = "eager"
    linears = linears_of_blocks(model)
    seen, recorded = seen_by_hooks(model, linears), Recorded(directory, threads=2).inputs()
    assert linears.keys() <= recorded.keys()
    for name in linears:
        inputs = [
            arguments[0].reshape(*tokens.shape, -1)
            for (arguments,), tokens in zip(zip(seen[name]), BATCHES)
        ]
        assert_saw(
            recorded[name],
            torch.cat([batch[:, 0] for batch in inputs]),
            torch.cat([batch[:, 1:].flatten(0, 1) for batch in inputs]),
        )


def test_linears_that_read_the_same_tensor_are_observed_once(stored):
    statistics = Recorded(stored("llama")[0]).block(1)
    names = {
        "self_attn.q_proj": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "self_attn.o_proj": ["self_attn.o_proj"],
    }
    names |= {"mlp.gate_proj": ["mlp.gate_proj", "mlp.up_proj"], "mlp.down_proj": ["mlp.down_proj"]}
    prefix = "model.layers.1."
    assert statistics.linears == {
        prefix + name: [prefix + linear for linear in linears] for name, linears in names.items()
    }


def test_linears_outside_of_a_batch_are_not_observed(stored):
    blockwise = open_blockwise(stored("llama")[0])
    with blockwise.block(0) as block:
        recorder = BlockRecorder(blockwise, 0, block)
        with recorder.batch((1, 2), 0, {}) as statistics:
            pass
        block.mlp.up_proj(torch.ones(1, 2, 64).bfloat16())
        assert not statistics.inputs
        recorder.close()
        with recorder.batch((1, 2), 0, {}) as statistics:
            block.mlp.up_proj(torch.ones(1, 2, 64).bfloat16())
        assert not statistics.inputs


def test_linears_that_got_no_token_are_not_taken_for_readers_of_one_input():
    """Experts that are modules of their own may be called with nothing."""
    block = nn.ModuleDict(
        {"experts": nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])}
    )
    blockwise = SimpleNamespace(block_name=lambda number: "b", sources=lambda name: None)
    recorder = BlockRecorder(blockwise, 0, block)
    with recorder.batch((1, 6), 0, {}) as statistics, torch.inference_mode():
        for expert, tokens in zip(block["experts"], (0, 0, 5)):
            expert(torch.full((tokens, 4), 2.0))
    statistics = recorder.complete(statistics)
    assert statistics.linears == {
        f"b.experts.{expert}": [f"b.experts.{expert}"] for expert in range(3)
    }
    assert [statistics.inputs[f"b.experts.{expert}"].counts[0] for expert in range(3)] == [0, 0, 5]


def test_held_out_values_are_counted_above_what_came_before(stored):
    directory, _ = stored("llama")
    name = "model.layers.1.mlp.down_proj"
    inputs = Recorded(directory).inputs()[name]
    bound = inputs.amax / 4
    recorded = Recorded(directory, quarters=(0, 1, HELD_OUT), earlier={name: bound}).inputs()
    observer, last = recorded[name], Recorded(directory, BATCHES[2:]).inputs()[name]
    held_out = 2 * 23 * 96
    assert observer.counts[2] == held_out
    assert 0 < observer.counts[3] < held_out
    assert observer.counts[3] == _count_above(directory, stored("llama")[1], name, bound)
    assert observer.quarter_amax == [
        *[pytest.approx(amax) for amax in observer.quarter_amax[:2]],
        None,
        last.amax,
    ]
    # nothing is known to have come before
    assert recorded["model.layers.1.mlp.up_proj"].counts[3] == 0


def _count_above(directory, model: nn.Module, name: str, bound: float) -> int:
    ((inputs,),) = seen_by_hooks(model, {name: model.get_submodule(name)}, BATCHES[2:])[name]
    return int((inputs[:, 1:].float().abs() > bound).sum())


# ---- Keys and values.


@pytest.mark.parametrize(
    "kind, module",
    [
        ("llama", "model.layers.{}.self_attn"),
        ("phi3", "model.layers.{}.self_attn"),
        ("gpt_neox", "gpt_neox.layers.{}.attention"),
    ],
)
def test_keys_and_values_are_measured_per_head_after_rotary_embedding(stored, kind, module):
    directory, model = stored(kind)
    recorded = Recorded(directory)
    with one_thread(), torch.inference_mode():
        caches = [model(input_ids=tokens, use_cache=True).past_key_values for tokens in BATCHES]
    for number in range(2):
        expected = {}
        for which, kept in (("k", "keys"), ("v", "values")):
            states = [getattr(cache.layers[number], kept) for cache in caches]
            expected[module.format(number), which] = torch.stack(
                [batch.float().abs().amax((0, 2, 3)) for batch in states]
            ).amax(0)
        heads = recorded.block(number).heads
        assert heads.keys() == expected.keys()
        assert all(torch.equal(heads[key].amax, amax) for key, amax in expected.items())
        assert len(set(heads[module.format(number), "k"].amax.tolist())) > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in ARCHITECTURES if kind not in EXPERT_KINDS])
def test_a_cache_that_observes_and_recorded_blocks_change_no_bit(stored, kind):
    directory, model = stored(kind)
    model.config._experts_implementation = "eager"
    output = Recorded(directory, threads=2).output
    assert all(
        torch.equal(one, other)
        for one, other in zip(output, ordinary_hidden_states(model, BATCHES))
    )


# ---- Experts.


def routed(model: nn.Module, kind: str, number: int):
    """A block's experts, and for each batch what they are given: ([tokens, features], the experts
    of each token).
    """
    layer = model.model.layers[number]
    if kind != "llama4_text":
        return layer.mlp.experts, [
            (hidden, chosen)
            for hidden, chosen, *_ in seen_by_hooks(model, {"experts": layer.mlp.experts})[
                "experts"
            ]
        ]
    calls = []
    for (hidden,) in seen_by_hooks(model, {"moe": layer.feed_forward})["moe"]:
        hidden = hidden.flatten(0, 1)
        with one_thread(), torch.inference_mode():
            scores, chosen = nn.functional.linear(hidden, layer.feed_forward.router.weight).topk(1)
            calls.append((hidden * torch.sigmoid(scores.float()).to(hidden.dtype), chosen))
    return layer.feed_forward.experts, calls


def expert_inputs(model: nn.Module, kind: str, number: int, all_experts: bool = False):
    """For each expert of a block, (which rows are first positions, its first input, its second
    one), by this file's own arithmetic.
    """
    experts, calls = routed(model, kind, number)
    found = []
    for expert in range(4):
        parts = []
        for (hidden, chosen), tokens in zip(calls, BATCHES):
            # In the order of the router's choices: first all first choices, then all second ones.
            rows = (
                torch.arange(len(hidden)) if all_experts else (chosen == expert).T.nonzero()[:, 1]
            )
            states, first = hidden[rows], rows % tokens.shape[1] == 0
            with one_thread(), torch.inference_mode():
                parts.append((first, states, _second_input(experts, kind, expert, states)))
        found.append([torch.cat(column) for column in zip(*parts)])
    return found, [chosen for _, chosen in calls]


def _second_input(experts: nn.Module, kind: str, expert: int, states: torch.Tensor) -> torch.Tensor:
    if kind == "gpt_oss":
        projected = states @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
        gate, up = projected[:, ::2].clamp(max=7.0), projected[:, 1::2].clamp(-7.0, 7.0)
        return (up + 1) * (gate * torch.sigmoid(gate * 1.702))
    projected = (
        states @ experts.gate_up_proj[expert]
        if kind == "llama4_text"
        else nn.functional.linear(states, experts.gate_up_proj[expert])
    )
    gate, up = projected.chunk(2, -1)
    return nn.functional.silu(gate) * up


# Names on disk: what reads an expert's first input, what reads its second, and where the layer's
# experts are.
NAMES = {
    "mixtral": (["{}.w1", "{}.w3"], ["{}.w2"], "model.layers.{}.block_sparse_moe.experts"),
    "qwen3_moe": (["{}.gate_proj", "{}.up_proj"], ["{}.down_proj"], "model.layers.{}.mlp.experts"),
    "gpt_oss": (["{}.gate_proj", "{}.up_proj"], ["{}.down_proj"], "model.layers.{}.mlp.experts"),
    "llama4_text": (
        ["{}.gate_proj", "{}.up_proj"],
        ["{}.down_proj"],
        "model.layers.{}.feed_forward.experts",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("all_experts", [False, True])
def test_each_experts_statistics_are_those_of_an_eager_forward(stored, kind, all_experts):
    directory, model = stored(kind)
    recorded = Recorded(directory, threads=2, all_experts=all_experts)
    observers = recorded.inputs()
    for number in range(2):
        first_names, down_names, place = NAMES[kind]
        expected, _ = expert_inputs(model, kind, number, all_experts)
        for expert, (first, states, intermediate) in enumerate(expected):
            for names, rows in ((first_names, states), (down_names, intermediate)):
                for name in names:
                    observer = observers.get(
                        f"{place.format(number)}.{name.format(expert)}",
                        InputObserver.empty(rows.shape[1]),
                    )
                    assert_saw(observer, rows[first], rows[~first])
        assert any(first.any() for first, *_ in expected) and any(
            len(states) for _, states, _ in expected
        )


@pytest.mark.parametrize("kind", TOLD)
@pytest.mark.parametrize("all_experts", [False, True])
def test_observed_experts_give_the_eager_output_bit_for_bit(stored, kind, all_experts):
    directory, model = stored(kind)
    output = Recorded(directory, all_experts=all_experts).output
    assert all(
        torch.equal(one, other)
        for one, other in zip(output, ordinary_hidden_states(model, BATCHES))
    )


def test_experts_that_are_given_all_tokens_return_the_same_from_those_sent_to_them(tmp_path):
    """In float32: a product of fewer rows may add up in another order."""
    model = make_model(tmp_path, "llama4_text", torch.float32)
    for one, other in zip(Recorded(tmp_path).output, ordinary_hidden_states(model, BATCHES)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXPERT_KINDS)
@pytest.mark.parametrize("all_experts", [False, True])
def test_tokens_per_expert_are_the_routers_choice(stored, kind, all_experts):
    directory, model = stored(kind)
    recorded = Recorded(directory, all_experts=all_experts)
    for number in range(2):
        _, chosen = expert_inputs(model, kind, number)
        counts = sum(torch.bincount(batch.flatten(), minlength=4) for batch in chosen)
        assert {
            name: tokens.tolist() for name, tokens in recorded.block(number).experts.items()
        } == {NAMES[kind][2].format(number): counts.tolist()}


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_names_are_those_of_the_checkpoint(stored, kind):
    """Every Linear of the file is somebody's reader, and nobody else is; a stack on disk has the
    names that an export gives its parts.
    """
    directory, _ = stored(kind)
    recorded = Recorded(directory)
    for number, recorder in enumerate(recorded.recorders):
        statistics = recorder.complete(recorded.block(number))
        with safe_open(directory / "model.safetensors", "pt") as file:
            shapes = {
                name: file.get_slice(name).get_shape()
                for name in file.keys()  # noqa: SIM118
                if name.startswith(f"model.layers.{number}.")
            }
        linears = {
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if name.endswith("weight") and len(shape) == 2
        }
        # A router is no Linear of the module tree, but in Llama 4.
        linears -= {
            name
            for name in linears
            if name.endswith((".gate", ".router")) and kind != "llama4_text"
        }
        for name in [name for name, shape in shapes.items() if len(shape) == 3]:
            module, _, leaf = name.rpartition(".")
            linears |= {
                f"{module}.{expert}.{part}"
                for part in leaf.replace("gate_up_", "gate_proj up_").split()
                for expert in range(4)
            }
        assert {linear for readers in statistics.linears.values() for linear in readers} == linears
        assert sum(len(readers) for readers in statistics.linears.values()) == len(linears)


def test_an_expert_that_no_token_reached_has_an_empty_observer(stored):
    directory, _ = stored("mixtral")
    recorded = Recorded(directory, make_batches((1, 1)), quarters=(0,))
    statistics = recorded.block(0)
    assert len(statistics.inputs) == 2 + 2 * 2  # two experts of four
    complete = recorded.recorders[0].complete(statistics)
    assert len(complete.inputs) == 2 + 2 * 4
    silent = [observer for observer in complete.inputs.values() if not observer.counts[:2].any()]
    assert len(silent) == 4
    assert all(
        observer.amax == observer.first_amax == 0 and observer.is_finite() for observer in silent
    )
    assert complete.linears["model.layers.0.block_sparse_moe.experts.3.w1"] == [
        f"model.layers.0.block_sparse_moe.experts.3.{leaf}" for leaf in ("w1", "w3")
    ]


def test_the_order_is_that_of_the_block_whichever_expert_came_first(stored):
    directory, _ = stored("mixtral")
    orders = []
    for batches in (make_batches((1, 1)), BATCHES, BATCHES[::-1]):
        recorded = Recorded(directory, batches)
        orders.append(list(recorded.recorders[1].complete(recorded.block(1)).inputs))
    assert orders[0] == orders[1] == orders[2]


# ---- Together.


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_batches_merge_in_any_order(stored, kind):
    recorded = Recorded(stored(kind)[0], quarters=(0, 1, HELD_OUT))
    for number in range(2):
        for order in itertools.permutations(recorded.by_batch[number]):
            assert_same(merged(order), recorded.block(number))


def test_threads_record_what_one_records(stored):
    directory, _ = stored("mixtral")
    one, many = Recorded(directory), Recorded(directory, threads=4)
    for number in range(2):
        for alone, among in zip(one.by_batch[number], many.by_batch[number]):
            assert_same(alone, among)


class _ProcessesOfOneTest:
    """torch.distributed's two calls, between threads in place of processes."""

    def __init__(self, count: int) -> None:
        self.barrier, self.rank, self.content = (
            threading.Barrier(count),
            threading.local(),
            [None] * count,
        )

    def _exchange(self, content) -> list:
        self.content[self.rank.number] = content
        self.barrier.wait(30)
        gathered = list(self.content)
        self.barrier.wait(30)
        return gathered

    def all_gather_object(self, gathered: list, content, group=None) -> None:
        gathered[:] = self._exchange(content)

    def all_reduce(self, tensor: torch.Tensor, operation, group=None) -> None:
        parts = torch.stack(self._exchange(tensor.clone()))
        tensor.copy_(parts.sum(0) if operation == torch.distributed.ReduceOp.SUM else parts.amax(0))

    def reduced(self, parts) -> list[BlockStatistics]:
        results, errors = [None] * len(parts), []

        def run(rank: int) -> None:
            self.rank.number = rank
            try:
                results[rank] = parts[rank].reduced(Ranks(rank, len(parts)))
            except BaseException as error:
                errors.append(error)
                self.barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return results


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_together_have_what_one_process_has(stored, monkeypatch, count):
    """Also where a rank met experts that another didn't, or no batch at all."""
    directory, _ = stored("mixtral")
    batches = make_batches((1, 1), (1, 2), (2, 3), (1, 1))
    recorded = Recorded(directory, batches, quarters=(0, 1, 2, HELD_OUT))
    processes = _ProcessesOfOneTest(count)
    monkeypatch.setattr(torch.distributed, "all_reduce", processes.all_reduce)
    monkeypatch.setattr(torch.distributed, "all_gather_object", processes.all_gather_object)
    for number in range(2):
        parts = recorded.by_batch[number]
        shares = [[parts[0]], [parts[1], parts[2], parts[3]], []][:count]
        for result in processes.reduced([merged(share) for share in shares]):
            assert_same(result, recorded.block(number))
        assert merged(shares[0]).inputs.keys() != merged(shares[1]).inputs.keys()


def test_one_rank_keeps_its_statistics():
    statistics = BlockStatistics()
    assert statistics.reduced(Ranks()) is statistics


@pytest.mark.parametrize("position", [0, 5])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_names_block_and_linear(stored, position, value):
    blockwise = open_blockwise(stored("llama")[0])
    blockwise.load_outer(with_head=False)
    captured = blockwise.capture(BATCHES[0], ObservingCache())
    with blockwise.block(1) as block, torch.inference_mode():
        # What follows the activation, so that the other inputs of the block are finite.
        block.mlp.act_fn.register_forward_hook(
            lambda _, __, output: output.index_fill(1, torch.tensor(position), value)
        )
        recorder = BlockRecorder(blockwise, 1, block)
        with recorder.batch(BATCHES[0].shape, 0, {}) as statistics:
            blockwise.run_block(block, captured.inputs[1], captured.hidden)
    with pytest.raises(
        CalibrationError,
        match=r"the input of model\.layers\.1\.mlp\.down_proj holds NaN or infinity",
    ):
        statistics.require_finite()


@pytest.mark.parametrize("which, name", [("k", "keys"), ("v", "values")])
def test_keys_and_values_that_are_not_finite_name_their_module(stored, which, name):
    statistics = Recorded(stored("llama")[0]).block(1)
    statistics.require_finite()
    statistics.heads["model.layers.1.self_attn", which].amax[0] = torch.nan
    with pytest.raises(
        CalibrationError, match=rf"the {name} of model\.layers\.1\.self_attn hold NaN"
    ):
        statistics.require_finite()


def test_tensors_hold_everything_under_the_names_of_the_checkpoint(stored):
    statistics = Recorded(stored("mixtral")[0]).block(1)
    tensors = statistics.tensors()
    name, place = "model.layers.1.self_attn", "model.layers.1.block_sparse_moe.experts"
    assert {
        f"{name}.k_amax",
        f"{name}.v_amax",
        f"{place}.expert_tokens",
        f"{place}.1.w2.channel_amax",
    } <= tensors.keys()
    assert len(tensors) == 7 * len(statistics.inputs) + 2 + 1
