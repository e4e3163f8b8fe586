"""Which part of a checkpoint is taken, and what is said of one that does not fit: by small dictionaries."""

import json
import zipfile
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moee.errors import UserError
from moee.weights.difference import difference, image_size
from moee.weights.fitting import Fit, best_fit, classes_of, listed
from moee.weights.prefixes import MAX_PREFIXES, is_average, prefixes
from moee.weights.weights_file import (
    _check_archive,
    _reason,
    checkpoint_size,
    containers,
    read_checkpoint,
    shards_of,
    unusable,
)


class Net(nn.Module):
    """Two maps and a head, with timm's names of them."""

    def __init__(self, classes=4, width=6):
        super().__init__()
        self.num_classes = classes
        self.default_cfg = self.pretrained_cfg = {"classifier": "head", "first_conv": "stem"}
        self.stem, self.body, self.head = nn.Conv2d(3, width, 2), nn.Linear(width, width), nn.Linear(width, classes)


HEAD = ("head",)


def state(classes=4, width=6, seed=0):
    torch.manual_seed(seed)
    return dict(Net(classes, width).state_dict())


def fit_of(given, model=None):
    return best_fit([("", given)], model or Net(), HEAD)


def told(given, model=None, says=None):
    model = model or Net()
    return difference(fit_of(given, model), model, "net", HEAD, says)


def test_prefix_tokens_are_no_part_of_the_square_of_a_position_embedding():
    model = Net()
    model.patch_embed, model.num_prefix_tokens = nn.Identity(), 5
    model.patch_embed.patch_size = (8, 8)
    assert image_size((1, 5 + 4, 6), model) == 16 and image_size((1, 4, 6), model) is None


def test_a_fit_is_complete_when_nothing_differs():
    whole = fit_of(state())
    assert whole.complete and whole.fitting == set(state()) and whole.sentence() == "6 tensors"
    for change in ({"missing": ("a",)}, {"unexpected": ("a",)}, {"mismatched": {"a": ((1,), (2,))}}):
        assert not Fit("", "", {}, **change).complete
    assert Fit("", "", {}, outside=("a",), resized={"a": ((1,), (2,))}).complete


def test_of_two_fits_the_one_that_fits_more_and_differs_less_is_better():
    names = frozenset("abc")
    better = Fit("", "", {}, names)
    for worse in (
        Fit("", "", {}, frozenset("ab")),
        Fit("", "", {}, names, unexpected=("x",)),
        Fit("", "", {}, names, {"x": ((1,), (2,))}),
    ):
        assert better.rank > worse.rank
    assert (
        Fit("", "", {}, names, unexpected=("x", "y")).rank == Fit("", "", {}, names, {"x": ((1,), (2,))}, unexpected=("y",)).rank
    )
    # the rest of a file may lie under a wrapper beside another model's weights
    mixed = {f"backbone.{key}": value for key, value in state().items()}
    found = fit_of({**mixed, "student.head.weight": torch.ones(4, 6)})
    assert found.complete and found.prefix == "backbone." and found.outside == ("student.head.weight",)
    assert found.sentence() == "6 tensors, prefix backbone. removed, student.head.weight left out"


def test_averaged_weights_come_before_plain_ones_and_the_named_part_before_all():
    plain, average = state(seed=1), state(seed=2)
    content = {"state_dict": plain, "state_dict_ema": average}
    found = best_fit(containers_of(content), Net(), HEAD)
    assert found.container == "state_dict_ema" and torch.equal(found.state["body.weight"], average["body.weight"])
    recorded = best_fit(containers_of(content), Net(), HEAD, ("state_dict", ""))
    assert recorded.container == "state_dict" and torch.equal(recorded.state["body.weight"], plain["body.weight"])
    assert best_fit(containers_of(content), Net(), HEAD, ("model", "")).missing == tuple(state())
    for one, other in (("net_ema.", "net."), ("ema_encoder.", "encoder."), ("model_ema.", "model.")):  # in one dictionary
        both = {one + key: t for key, t in average.items()} | {other + key: t for key, t in plain.items()}
        found = fit_of(both)
        assert found.complete and found.prefix == one and torch.equal(found.state["body.weight"], average["body.weight"])
    assert is_average("model.ema.0") and is_average("Teacher_weights") and not is_average("schema") and not is_average("cinema.x")


def containers_of(content, tmp=Path("/dev/null"), size=1 << 20):
    with patch("moee.weights.weights_file.checkpoint_size", lambda path: size):
        return containers(content, tmp)


def test_containers_are_found_three_deep_and_an_optimisers_come_last():
    inner = state()
    three = containers_of({"a": {"b": {"c": inner}}})
    assert [name for name, _ in three] == ["a.b.c"]
    with pytest.raises(UserError, match=r"holds no tensors by name \('?a'?\)"):
        containers_of({"a": {"b": {"c": {"d": inner}}}})
    order = [
        name for name, _ in containers_of({"optimizer": inner, "model": inner, "grads": inner, "ema": inner, "options": inner})
    ]
    assert order == ["ema", "model", "options", "optimizer", "grads"]


def test_tensors_that_the_file_cannot_hold_are_refused():
    whole = {"x": torch.ones(100)}  # 400 bytes
    assert containers_of(whole, size=401)
    with pytest.raises(UserError, match="claims tensors of 400 bytes in a file of 399"):
        containers_of(whole, size=399)
    shared = torch.ones(100)
    assert containers_of({str(i): shared for i in range(4)}, size=401)
    with pytest.raises(UserError, match="claims tensors of 2000 bytes in a file of 401"):
        containers_of({str(i): shared for i in range(5)}, size=401)


def test_prefixes_are_those_of_wrappers_around_one_another():
    assert prefixes(["weight"]) == [""]
    assert prefixes(["module._orig_mod.model.backbone.weight"]) == [
        "", "module.", "module._orig_mod.", "module._orig_mod.model.", "module._orig_mod.model.backbone.",
    ]  # fmt: skip
    assert prefixes(["module." * 6 + "weight"])[-1] == "module." * 4
    many = [
        f"{a}{b}{c}w"
        for a in ("module.", "model.", "net.")
        for b in ("ema.", "net.", "model.")
        for c in ("ema.", "net.", "model.")
    ]
    assert len(prefixes(many)) == MAX_PREFIXES and prefixes(many)[0] == ""


@pytest.mark.parametrize(
    ("count", "text"), [(0, ""), (1, "n0"), (3, "n0, n1, n2"), (4, "n0, n1, n2 and 1 more"), (9, "n0, n1, n2 and 6 more")]
)
def test_long_lists_are_cut_and_counted(count, text):
    assert listed(f"n{i}" for i in range(count)) == text


@pytest.mark.parametrize(
    ("weight", "bias", "classes"),
    [((7, 6), (7,), 7), ((6, 7), (7,), 7), ((7, 6), None, 7), ((5, 5), (5,), 5), ((9, 6, 1, 1), (9,), 9), ((7, 6), (6,), 6)],
)
def test_classes_are_counted_of_a_transposed_head_too(weight, bias, classes):
    given = {"head.weight": torch.ones(weight)} | ({"head.bias": torch.ones(bias)} if bias else {})
    assert classes_of({"body.weight": torch.ones(3, 3), **given}, HEAD) == classes
    assert classes_of(given, ("other",)) == 0 and classes_of({"head.weight": torch.ones(5)}, HEAD) == 0


def test_what_differs_is_said_with_the_flag_that_mends_it():
    assert told(state(classes=7)) == "the file has 7 classes, net has 4: add --num-classes 7"
    assert told({k: v for k, v in state().items() if not k.startswith("head")}).startswith(
        "the file has no classifier, net has one:"
    )
    half = {k: v for k, v in state().items() if k != "head.bias"}
    assert told(half).startswith("the file has only a part of the classifier and lacks head.bias")
    grey = {**state(), "stem.weight": torch.ones(6, 1, 2, 2)}
    assert told(grey) == "the file has 1 input channels, net has 3: add --in-chans 1"
    turned = {**state(), "head.weight": torch.ones(6, 4)}
    assert (
        told(turned)
        == "head.weight of the classifier is [6, 4], net takes [4, 6]: it is transposed, store it the other way round"
    )
    whole_numbers = {**state(), "body.weight": torch.ones(6, 6, dtype=torch.int32)}
    assert told(whole_numbers).startswith("body.weight is int32 [6, 6], expected [6, 6] of real ones")
    few = {"body.weight": torch.ones(6, 6), "x": torch.ones(1)}
    assert told(few).startswith("1 of its 2 tensors fit the 6 of net: it belongs to another model;")
    assert told(few, says="vit") == "the file says that it is vit; 1 of its 2 tensors fit the 6 of net: give that name"
    more = {**state(), "extra": torch.ones(1)}
    assert (
        told(more)
        == "6 of its 7 tensors fit the 6 of net: 1 unexpected (extra); check the model's name, --img-size and --model-kwargs"
    )


def test_a_prefix_of_nobodys_is_taken_from_half_of_the_tensors_on():
    some = {f"weird.{key}": state()[key] for key in ("stem.weight", "stem.bias", "body.weight")}
    assert fit_of(some).prefix == "weird." and told(some).startswith("3 of its 3 tensors under weird. fit the 6 of net")
    del some["weird.stem.bias"]
    assert fit_of(some).prefix == ""


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (10, "the file was trained on 48 pixels, net takes another size: add --img-size 48"),
        (8, "pos_embed is [1, 8, 6], expected [1, 5, 6]"),
    ],
)
def test_positions_of_another_size_are_said_in_pixels(tokens, said):
    model = Net()
    model.patch_embed, model.pos_embed = nn.Module(), nn.Parameter(torch.zeros(1, 5, 6))
    model.patch_embed.patch_size = (16, 16)
    assert said in told({**model.state_dict(), "pos_embed": torch.zeros(1, tokens, 6)}, model)


@pytest.mark.parametrize(
    ("tokens", "prefix", "own", "size"),
    [(197, 1, False, 224), (196, 0, False, 224), (198, 2, False, 224), (196, 1, True, 224), (197, 0, False, None),
     (1, 1, False, None),
     (2, 1, False, 16), (0, 1, False, None)],
)  # fmt: skip
def test_the_size_of_images_is_told_by_the_positions(tokens, prefix, own, size):
    model = nn.Module()
    model.patch_embed = nn.Module()
    model.patch_embed.patch_size, model.num_prefix_tokens, model.no_embed_class = (16, 16), prefix, own
    assert image_size((1, tokens, 8), model) == size
    assert image_size((tokens, 8), model) is None and image_size((1, tokens, 8), nn.Module()) is None


def index(folder, places):
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": places}))
    return path


def test_shards_are_files_of_the_indexs_own_folder(tmp_path):
    for name, tensor in (("b", torch.zeros(2)), ("a", torch.ones(2))):
        save_file({name: tensor, "old": tensor.clone()}, tmp_path / f"{name}.safetensors")
    path = index(tmp_path, {"x": "b.safetensors", "a": "a.safetensors", "old": "a.safetensors"})
    assert [shard.name for shard in shards_of(path)] == ["a.safetensors", "b.safetensors"]
    with pytest.raises(UserError, match="'x' is not in 'b.safetensors', which it names for it"):
        read_checkpoint(path)
    found = read_checkpoint(index(tmp_path, {"b": "b.safetensors", "a": "a.safetensors", "old": "b.safetensors"}))
    assert sorted(found) == ["a", "b", "old"] and found["old"].tolist() == [0, 0]
    size = sum((tmp_path / name).stat().st_size for name in ("a.safetensors", "b.safetensors")) + path.stat().st_size
    alone = tmp_path / "a.safetensors"
    assert checkpoint_size(path) == size and checkpoint_size(alone) == alone.stat().st_size
    with pytest.raises(UserError, match="names the shard 'c.safetensors', which is not beside it"):
        shards_of(index(tmp_path, {"a": "a.safetensors", "c": "c.safetensors"}))


@pytest.mark.parametrize(
    "places",
    [{}, {"a": "../a.safetensors"}, {"a": "a.txt"}, {"a": "a.bin", "b": "/b.bin"}, {str(i): f"{i}.bin" for i in range(1001)}],
)  # fmt: skip
def test_an_index_names_some_files_and_not_too_many(tmp_path, places):
    with pytest.raises(UserError, match="as its shards; expected files of its own folder"):
        shards_of(index(tmp_path, places))


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 5}}', '{"weight_map": ["a"]}', "no JSON"]
)
def test_what_is_no_index_is_said(tmp_path, content):
    (tmp_path / "x.index.json").write_text(content)
    with pytest.raises(UserError, match="is no index of shards"):
        shards_of(tmp_path / "x.index.json")


def test_tensors_without_plain_values_are_named_where_they_lie():
    sparse = torch.ones(2, 2).to_sparse()
    content = {"w": sparse, "a": {"w": torch.ones(1), "b": {"x": sparse, "y": torch.ones(1, device="meta")}}}
    assert unusable(content, "") == {"w": "sparse_coo"} and unusable(content, "a") == {}
    assert unusable(content, "a.b") == {"x": "sparse_coo", "y": "on the device meta"}
    assert unusable({"a": {"b": {"c": {"x": sparse}}}}, "a.b.c") == {"x": "sparse_coo"}


def test_what_was_resized_is_said_once_and_counted():
    sizes = {f"p{i}": ((1, 4), (1, 9)) for i in range(3)}
    one, three = (Fit("ema", "net.", {}, frozenset("abcd"), resized=dict(list(sizes.items())[:n])).sentence() for n in (1, 3))
    assert one == "ema, 4 tensors, prefix net. removed, p0 resized from [1, 4] to [1, 9]" and three == f"{one} and 2 more"


def test_as_many_shards_as_may_be_are_looked_for(tmp_path):
    with pytest.raises(UserError, match="names the shard '0.bin', which is not beside it"):
        shards_of(index(tmp_path, {str(i): f"{i}.bin" for i in range(1000)}))


@pytest.mark.parametrize(
    ("members", "kind", "message"),
    [
        ({"x/data.pkl": b"1", "x/constants.pkl": b"2"}, zipfile.ZIP_STORED, "is a TorchScript archive"),
        ({"x/data.pkl": b"1" * 500}, zipfile.ZIP_DEFLATED, "is a compressed archive"),
        ({"x/data.pkl": b"no pickle"}, zipfile.ZIP_STORED, "is no checkpoint|is damaged"),
    ],
)
def test_archives_that_torch_never_writes_are_refused(tmp_path, members, kind, message):
    with zipfile.ZipFile(tmp_path / "w.pth", "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "w.pth")


def test_members_that_claim_more_than_the_file_holds_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("x/data.pkl", b"1" * 300)
    size = (tmp_path / "w.pth").stat().st_size
    for claimed, refused in ((size, False), (size + 1, True)):
        member = zipfile.ZipInfo("x/data.pkl")
        member.file_size, member.compress_type = claimed, zipfile.ZIP_STORED
        monkeypatch.setattr(zipfile.ZipFile, "infolist", lambda self, member=member: [member])
        with pytest.raises(UserError, match="is a compressed archive") if refused else nullcontext():
            _check_archive(tmp_path / "w.pth", size)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("one\nGLOBAL os.system was not allowed\nend", "wants os.system, and only tensors, plain values"),
        ("x but got <class 'a.B'>", "wants a.B, and only"), ("a legacy .tar file", "is damaged, or has the .tar format"),
        ("Unsupported operand 149", "is no checkpoint that torch.save wrote"),
        ("Weights only load failed", "is no checkpoint that"),
        ("first\nlast one\n\n  \n", "is damaged or no checkpoint by torch.save (last one)"), ("", "by torch.save (EOFError)"),
    ],
)  # fmt: skip
def test_why_torch_refused_is_one_sentence(message, said):
    assert said in _reason(message, "EOFError")
