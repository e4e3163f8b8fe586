"""The resource table: figures of a kernel in its row, one sentence on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plugins.aot import manifest, resources
from plugins.aot.build import build_kernels
from plugins.contract import DTYPES
from plugins.tactics import VARIANTS
from plugins.targets import DEFAULT_SMS


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build_kernels(tmp_path_factory.mktemp("r") / "k", [87], dtypes=["float16"])


def test_table(built):
    text = resources.table(built)
    k = built.find("expert_up", "bm64", "float16", 87)
    line = next(l for l in text.splitlines() if l.startswith("| expert_up bm64 "))
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells[2:6] == [str(k.num_warps), str(k.registers), str(k.shared_bytes), "0/0"]
    assert cells[7:] == [str(k.mma_count), str(k.cp_async_count)]
    assert "| 87 | Jetson Orin | ptxas | 7.8 | CUDA 12.0 | CUDA 11.8 |" in text
    with pytest.raises(ValueError, match="has no folder"):
        resources.table(manifest.parse(json.loads(built.to_json())))


def test_the_committed_table_is_of_these_kernels():
    """One row a kernel of the default build; after a change of the tactic table the document must be made again."""
    text = (Path(__file__).parents[2] / "docs" / "results" / "kernels.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and " % |" not in line and "%)" in line]
    want = [f"| {role} {variant} | {dtype} |" for dtype in DTYPES for role, variant in VARIANTS[dtype]]
    for sm in DEFAULT_SMS:
        assert f"## sm_{sm} " in text
    want *= len(DEFAULT_SMS)
    assert [row[: len(start)] for row, start in zip(rows, want, strict=True)] == want


def test_bad_folder(tmp_path, capsys):
    assert resources.main([str(tmp_path)]) == 2 and "not found" in capsys.readouterr().err
    assert resources.main([]) == 2
