"""Short names of models."""

from quantkit.checkpoint.short_names import short_names


def test_a_model_is_called_by_its_last_component():
    assert short_names(["/models/a", "out/b/", "c"]) == {"/models/a": "a", "out/b/": "b", "c": "c"}


def test_models_of_one_name_are_told_apart():
    names = short_names(["/x/one/out", "/x/two/out", "/x/three"])
    assert names == {"/x/one/out": "one/out", "/x/two/out": "two/out", "/x/three": "three"}
    assert short_names(["out", "/out", "x/out"]) == {"out": "out", "/out": "/out", "x/out": "x/out"}


def test_a_snapshot_of_the_hub_is_called_by_its_repository():
    path = "/home/me/hub/models--org--tiny-1B/snapshots/0123abcd"
    assert short_names([path]) == {path: "tiny-1B"}
    fork = path.replace("--org--", "--fork--")
    assert set(short_names([path, fork]).values()) == {"org/tiny-1B", "fork/tiny-1B"}


def test_odd_paths_have_names():
    assert short_names(["/", "", "."]) == {"/": "/", "": "", ".": "."}
