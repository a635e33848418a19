"""Which tensors go into which shard."""

from quantkit.checkpoint.shard_plan import TensorPlan, plan_shards


def test_shards_keep_groups_together_and_within_the_limit():
    groups = [
        [TensorPlan(f"{n}.w", "I8", (60,)), TensorPlan(f"{n}.s", "F32", (5,))] for n in range(5)
    ]
    shards = plan_shards(groups, 160)
    assert [len(shard) for shard in shards] == [4, 4, 2]
    assert [plan for shard in shards for plan in shard] == [
        plan for group in groups for plan in group
    ]
    assert len(plan_shards(groups, 1)) == 5  # a group larger than the limit still gets a shard
