"""Tensors told apart by name and shape."""

from pathlib import Path

import pytest

from quantkit.checkpoint.header import TensorInfo
from quantkit.checkpoint.reader import Checkpoint
from quantkit.models.linear_views import find_stacks
from quantkit.models.tensor_roles import ModuleInfo, fused_layers, linears_of
from quantkit.schemes.pattern import covering_patterns


def roles(shapes: dict[str, tuple[int, ...]]) -> dict[str, ModuleInfo]:
    """What the tensors of a checkpoint of these names and shapes are."""
    tensors = {
        name: TensorInfo(name, "BF16", shape, Path("model.safetensors"), 0)
        for name, shape in shapes.items()
    }
    return dict(linears_of(Checkpoint(Path("model"), {}, tensors)).roles)


def kinds(shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    return {tensor: info.kind for tensor, info in roles(shapes).items()}


def assert_kinds(expected: dict[str, tuple[tuple[int, ...], str]]) -> None:
    assert kinds({tensor: shape for tensor, (shape, _) in expected.items()}) == {
        tensor: kind for tensor, (_, kind) in expected.items()
    }


def test_llama():
    block = "model.layers.0."
    linears = [f"self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj", "o_proj")] + [
        f"mlp.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")
    ]
    assert_kinds(
        {f"{block}{name}.weight": ((8, 4), "linear") for name in linears}
        | {
            "model.embed_tokens.weight": ((32, 8), "embedding"),
            f"{block}input_layernorm.weight": ((8,), "norm"),
            f"{block}post_attention_layernorm.weight": ((8,), "norm"),
            f"{block}self_attn.q_proj.bias": ((8,), "not a matrix"),
            "model.norm.weight": ((8,), "outside the blocks"),
            "lm_head.weight": ((32, 8), "lm_head"),
        }
    )


def test_norms_of_queries_and_keys_are_norms():
    for leaf in (
        "q_norm",
        "k_norm",
        "q_layernorm",
        "kv_a_layernorm",
        "ln_1",
        "ffn_norm",
        "pre_feedforward_layernorm",
    ):
        assert set(kinds({f"model.layers.3.self_attn.{leaf}.weight": (8,)}).values()) == {"norm"}
        # Cohere's q_norm is two-dimensional: [heads, head_dim].
        assert set(kinds({f"model.layers.3.self_attn.{leaf}.weight": (4, 8)}).values()) == {"norm"}


def test_mixtral():
    moe = "model.layers.1.block_sparse_moe."
    assert_kinds(
        {f"{moe}gate.weight": ((2, 8), "router")}
        | {
            f"{moe}experts.{expert}.{leaf}.weight": ((8, 8), "linear")
            for expert in (0, 1)
            for leaf in ("w1", "w2", "w3")
        }
    )


def test_qwen_moe():
    mlp = "model.layers.10.mlp."
    assert_kinds(
        {
            f"{mlp}gate.weight": ((2, 8), "router"),
            f"{mlp}shared_expert_gate.weight": ((1, 8), "router"),
            f"{mlp}experts.0.gate_proj.weight": ((8, 8), "linear"),
            f"{mlp}experts.11.down_proj.weight": ((8, 8), "linear"),
            f"{mlp}shared_expert.gate_proj.weight": ((8, 8), "linear"),
        }
    )


def test_a_router_by_name_is_a_router():
    assert_kinds(
        {
            "model.layers.0.mlp.router.weight": ((4, 8), "router"),
            "model.layers.0.mlp.router.layer.weight": ((4, 8), "router"),
        }
    )


def test_what_lies_in_a_router_is_one():
    """HunYuan's gate, ZAYA's, and what mixes Gemma 3n's streams."""
    mlp = "model.layers.0.mlp."
    assert_kinds(
        {
            f"{mlp}gate.wg.weight": ((4, 8), "router"),
            f"{mlp}gate.router_mlp.fc1.weight": ((8, 8), "router"),
            f"{mlp}gate.down_proj.weight": ((8, 8), "router"),
        }
        | {
            f"{mlp}experts.0.down_proj.weight": ((8, 8), "linear"),
            f"{mlp}experts.0.gate.weight": ((8, 8), "linear"),
        }
        | {
            "model.layers.0.altup.modality_router.weight": ((4, 8), "router"),
            "model.layers.0.attn.gate.out_proj.weight": ((8, 8), "linear"),
        }
    )


def test_an_embedding_in_parts_is_an_embedding():
    """Qwen 4's n-grams lie inside of a block."""
    ple = "model.layers.0.ple."
    assert_kinds(
        {
            f"{ple}ple_embedding.ngram_embedding.shard_0.weight": ((64, 8), "embedding"),
            f"{ple}key_proj.weight": ((8, 8), "linear"),
        }
    )


def test_what_projects_embeddings_is_none():
    """A runtime makes Linears of them, so they must be among those that the configuration
    ignores.
    """
    names = (
        "model.altup_unembed_projections.0",
        "electra.embeddings_project",
        "rembert.encoder.embedding_hidden_mapping_in",
    )
    assert_kinds({f"{name}.weight": ((8, 8), "outside the blocks") for name in names})


def test_matrices_of_a_state_space_are_left():
    mamba = "model.layers.0.mamba."
    assert_kinds(
        {
            f"{mamba}{leaf}": ((2, 64, 16), "used directly")
            for leaf in ("A_log", "dt_proj_weight", "x_proj_weight")
        }
        | {
            f"{mamba}in_proj.weight": ((64, 64), "linear"),
            "model.layers.1.mamba.x_proj_weight": ((2, 64, 16), "unreached"),
        }
    )


def test_experts_whose_rows_mean_something_else_are_unreached_by_name():
    dbrx, inkling = "transformer.blocks.0.ffn.experts.mlp.", "model.llm.layers.0.mlp."
    shapes = {f"{dbrx}w1": (384, 64), f"{dbrx}w2": (384, 64)}
    shapes |= {
        f"{inkling}experts.w13_weight": (4, 64, 32),
        f"{inkling}experts.w2_weight": (4, 32, 32),
        f"{inkling}w13_dn.weight": (64, 32),
    }
    infos = roles(shapes)
    assert {info.kind for info in infos.values()} == {"unreached"}
    assert [("DBRX" in info.reason, "Inkling" in info.reason) for info in infos.values()] == [
        (True, False)
    ] * 2 + [(False, True)] * 3
    # The same pair under another name is gate above up, as everywhere else.
    assert (
        not find_stacks(shapes)
        and len(
            find_stacks({"m.experts.gate_up_proj": (4, 64, 32), "m.experts.down_proj": (4, 32, 32)})
        )
        == 2
    )


def test_a_gate_beside_shared_experts_is_a_router():
    assert_kinds(
        {
            "model.layers.0.mlp.gate.weight": ((4, 8), "router"),
            "model.layers.0.mlp.shared_experts.up_proj.weight": ((8, 8), "linear"),
        }
    )


def test_what_joins_further_tokens_is_left():
    layer = "model.layers.61."
    assert_kinds(
        {
            f"{layer}eh_proj.weight": ((8, 16), "used directly"),
            f"{layer}shared_head.head.weight": ((32, 8), "lm_head"),
            f"{layer}embed_tokens.weight": ((32, 8), "embedding"),
            f"{layer}mlp.up_proj.weight": ((8, 8), "linear"),
        }
    )


def test_a_gate_without_experts_is_a_linear():
    assert_kinds(
        {
            "model.layers.0.mlp.gate.weight": ((8, 8), "linear"),
            "model.layers.1.mlp.experts.0.up_proj.weight": ((8, 8), "linear"),
        }
    )


def test_stacks_that_are_no_pair_of_experts_are_unreached():
    experts = "model.layers.0.mlp.experts."
    assert_kinds(
        {
            f"{experts}gate_up_proj": ((4, 16, 8), "unreached"),
            f"{experts}gate_up_proj_bias": ((4, 16), "unreached"),
            "model.layers.0.rg_lru.input_gate_weight": ((4, 16, 16), "unreached"),
            # a mask that some checkpoints hold
            "model.layers.0.attn.bias": ((1, 1, 64, 64), "not a matrix"),
            "model.layers.0.mlp.gate.weight": ((4, 8), "router"),
        }
    )


def test_linears_with_a_bias_are_linears():
    assert_kinds(
        {
            "model.layers.0.self_attn.q_proj.weight": ((24, 8), "linear"),
            "model.layers.0.self_attn.q_proj.bias": ((24,), "not a matrix"),
            "model.layers.0.self_attn.o_proj.weight": ((8, 8), "linear"),
            "model.layers.0.self_attn.o_proj.bias": ((8,), "not a matrix"),
        }
    )


@pytest.mark.parametrize(
    "tensor",
    [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "visual.blocks.0.attn.qkv.weight",
        "model.audio_tower.layers.0.fc1.weight",
        "multi_modal_projector.linear_1.weight",
        "model.mm_projector.0.weight",
    ],
)
def test_other_towers_are_left(tensor):
    assert kinds({tensor: (8, 8)}) == {tensor: "other tower"}


def test_the_language_model_of_a_multimodal_checkpoint_is_reached():
    assert_kinds(
        {
            "model.language_model.layers.0.mlp.up_proj.weight": ((8, 8), "linear"),
            "model.language_model.embed_tokens.weight": ((8, 8), "embedding"),
        }
    )


def test_what_is_no_matrix_is_left():
    assert_kinds(
        {
            "model.layers.0.mixer.conv1d.weight": ((8, 1, 4), "not a matrix"),
            "model.layers.0.mixer.A_log": ((8,), "not a matrix"),
        }
    )


def test_an_empty_matrix_is_unreached():
    assert_kinds({"model.layers.0.mlp.up_proj.weight": ((0, 8), "unreached")})


def test_all_but_linears_come_with_a_reason():
    infos = roles(
        {
            "lm_head.weight": (8, 8),
            "model.layers.0.mlp.up_proj.weight": (8, 8),
            "model.layers.0.mlp.experts.down_proj": (2, 8, 8),
        }
    )
    assert [bool(info.reason) for info in infos.values()] == [True, False, True]
    assert [info.name for info in infos.values()] == [
        "lm_head",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]


def test_blocks_of_a_block_diagonal_matrix_are_left_and_other_stacks_are_not():
    shapes = {
        "model.layers.0.rg_lru.recurrent_param": (128,),
        "model.layers.0.rg_lru.input_gate_weight": (4, 32, 32),
        "model.layers.1.mixer.vector": (64,),
        "model.layers.1.mixer.stack": (4, 32, 32),
        "model.layers.1.mlp.experts.scale": (128,),
        "model.layers.1.mlp.experts.square": (4, 32, 32),
    }
    kinds = {name: info.kind for name, info in roles(shapes).items()}
    assert kinds["model.layers.0.rg_lru.input_gate_weight"] == "used directly"
    assert (
        kinds["model.layers.1.mixer.stack"]
        == kinds["model.layers.1.mlp.experts.square"]
        == "unreached"
    )


def test_a_vector_beside_experts_is_no_bias_of_theirs():
    """What a router adds to its scores may lie among the experts (Laguna's)."""
    stacks = {
        "model.layers.1.mlp.experts.gate_up_proj": (4, 64, 32),
        "model.layers.1.mlp.experts.down_proj": (4, 32, 32),
    }
    vector = "model.layers.1.mlp.experts.e_score_correction_bias"
    assert roles(stacks | {vector: (4,)})[vector].kind == "not a matrix"


# Fused sets and block numbers


def test_fused_sets_are_projections_side_by_side():
    names = [
        f"model.layers.{block}.self_attn.{leaf}"
        for block in (0, 1)
        for leaf in ("v_proj", "q_proj", "k_proj", "o_proj")
    ]
    names += [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.down_proj",
    ]
    sets = [
        tuple(f"model.layers.{block}.self_attn.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj"))
        for block in (0, 1)
    ]
    assert sorted(fused_layers(names)) == sorted(
        [*sets, ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")]
    )


def test_each_expert_is_a_fused_set_of_its_own():
    names = [f"mlp.experts.{expert}.{leaf}" for expert in (0, 1) for leaf in ("w1", "w2", "w3")]
    assert fused_layers(names) == [
        ("mlp.experts.0.w1", "mlp.experts.0.w3"),
        ("mlp.experts.1.w1", "mlp.experts.1.w3"),
    ]


def test_queries_that_read_other_hidden_states_are_not_merged():
    """As vLLM's models have them: of cross-attention one Linear for the queries, one for keys and
    values.
    """
    for attention in ("encoder_attn", "cross_attn", "crossattention.self"):
        leaves = (
            ("query", "key", "value")
            if attention.endswith("self")
            else ("q_proj", "k_proj", "v_proj")
        )
        names = [f"decoder.layers.0.{attention}.{leaf}" for leaf in leaves]
        assert fused_layers(names) == [tuple(names[1:])]


def test_an_incomplete_set_is_none():
    assert fused_layers(["a.q_proj", "a.k_proj", "b.v_proj", "a.gate_proj"]) == []


def test_names_without_a_parent_fuse_too():
    assert fused_layers(["q_proj", "k_proj", "v_proj"]) == [("q_proj", "k_proj", "v_proj")]


@pytest.mark.parametrize(
    ("names", "others", "patterns"),
    [
        (["m.0.e.up", "m.0.e.down", "m.1.e.up"], ["m.0.a.up"], ["m.*.e.*"]),
        (["m.0.e.up", "m.1.e.up"], ["m.0.e.down"], ["m.*.e.up"]),
        (["m.0.e.up", "m.0.a.q"], ["m.1.e.up", "m.1.a.q"], ["m.0.*"]),
        (["m.0.e.up"], ["m.1.e.up", "m.0.a.q"], ["m.0.e.up"]),
        (
            ["m.0.e.up", "m.3.e.up", "m.0.f.x"],
            ["m.1.e.up", "m.0.a.q", "m.3.a.q"],
            ["m.0.e.up", "m.3.e.up", "m.*.f.*"],
        ),
        ([], ["m.0.e.up"], []),
    ],
)
def test_patterns_cover_the_names_and_no_others(names, others, patterns):
    assert covering_patterns(names, others) == patterns


ATTENTION, MOE = "model.layers.0.self_attn", "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("tensor", "shape", "kind"),
    [
        # lm_head and embeddings are outside of the blocks too, and may be of another tower.
        ("lm_head.weight", (32, 8), "lm_head"),
        ("vision_tower.lm_head.weight", (32, 8), "lm_head"),
        ("model.embed_tokens.weight", (32, 8), "embedding"),
        ("vision_tower.embed_tokens.weight", (32, 8), "other tower"),
        ("model.layers.0.shared_head.head.weight", (32, 8), "lm_head"),
        # A Linear's shape in another tower, or outside of the blocks.
        ("vision_tower.layers.0.q_proj.weight", (8, 8), "other tower"),
        ("model.projector.weight", (8, 8), "outside the blocks"),
        # Norms and embeddings are vectors or matrices.
        (f"{ATTENTION}.k_norm.weight", (8,), "norm"),
        (f"{ATTENTION}.k_norm.weight", (4, 8), "norm"),
        (f"{ATTENTION}.relative_attention_bias.weight", (32, 8), "embedding"),
        # A router next to experts has a Linear's shape; its bias is a router's too.
        (f"{MOE}.gate.weight", (2, 8), "router"),
        (f"{MOE}.gate.bias", (2,), "router"),
        # Names that are used directly, before empty shapes.
        (f"{ATTENTION}.dt_proj.weight", (0, 8), "used directly"),
        (f"{ATTENTION}.q_proj.weight", (0, 8), "unreached"),
        (f"{ATTENTION}.q_proj.bias", (8,), "not a matrix"),
        (f"{ATTENTION}.q_proj.weight", (8, 8), "linear"),
    ],
)
def test_the_first_rule_that_applies_decides(tensor, shape, kind):
    experts = {f"{MOE}.experts.0.up_proj.weight": (8, 8)}
    assert kinds(experts | {tensor: shape})[tensor] == kind
