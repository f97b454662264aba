"""The generated pages: the identity graph shows every reduction, the table every member."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

import attention_ref
from attention_ref.core.registry import written

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "docs" / "_ext"))
import pages

FAMILIES = sorted({key.split("/")[0] for key in written()})
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_graph_holds_every_reduction(family):
    keys = [key for key in written() if key.split("/")[0] == family]
    edges = [(key, r) for key in keys for r in attention_ref.get(key).reduces_to]
    if not edges:
        assert "Identities" not in pages.family_page(family, keys)
        return
    picture = ElementTree.fromstring(pages.graph(edges))
    texts = [t.text for t in picture.iter(f"{SVG}text")]
    names = {key for key, _ in edges} | {r.key for _, r in edges}
    names = {name.removeprefix(f"{family}/") for name in names}
    assert names <= set(texts)
    numbers = sorted(int(n) for t in texts if t not in names for n in t.split(", "))
    assert numbers == list(range(1, len(edges) + 1))
    arrows = {(key, r.key) for key, r in edges if key != r.key}
    assert len([p for p in picture.iter(f"{SVG}path") if p.get("marker-end")]) == len(arrows)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_members_table_has_a_line_each(family):
    keys = [key for key in written() if key.split("/")[0] == family]
    text = pages.members(keys, {keys[0]: {"work": 2.0, "largest": 1.0}})
    assert all(f"</methods/{key}>" in text for key in keys)
    assert ":math:`N^{2.0}`" in text and ":math:`N^{1.0}`" in text
