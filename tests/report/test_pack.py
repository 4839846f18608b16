"""Packing: what goes in comes out, equal maps once, damage is named."""

from __future__ import annotations

import base64
import json
import zlib

import pytest

from saccade.report import pack

SIZE = 4


def encoded(value, count=SIZE * SIZE):
    return base64.b64encode(bytes([value]) * count).decode()


def head(index, selections, **more):
    base = {"head": index, "kv_head": 0, "size": SIZE, "map": encoded(index), "selections": selections}
    return base | {"mass": {}, "density": {}} | more


def attention(*heads):
    return {"prompt": "x", "length": 32, "pool": 8, "layers": [{"layer": 3, "heads": list(heads)}]}


def inflate(text):
    return zlib.decompress(base64.b64decode(text))


def test_maps_come_back_from_where_the_index_says():
    given = attention(head(1, {"a": encoded(7), "b": encoded(8)}), head(2, {"a": encoded(7)}))
    packed = pack.pack_attention(given, ["b", "a", "c"])
    assert packed is not None
    stream = inflate(packed.layers[0])
    for source, place in zip(given["layers"][0]["heads"], packed.index["layers"][0]["heads"], strict=True):
        at = place["map"]
        assert stream[at : at + 16] == base64.b64decode(source["map"])
        for method, text in source["selections"].items():
            at = place["selections"][method]
            assert stream[at : at + 16] == base64.b64decode(text)
    assert len(stream) == 4 * 16  # two maps, and the selections 7 and 8 once each
    assert packed.index["methods"] == ["b", "a"]


def test_no_attention_is_no_viewer():
    assert pack.pack_attention(None, []) is None
    assert pack.pack_attention({"layers": []}, []) is None


def test_a_map_of_another_size_or_no_base64_is_refused():
    with pytest.raises(ValueError, match="the attention map of layer 3, head 1 holds 15 bytes, expected 4 x 4 = 16"):
        pack.pack_attention(attention(head(1, {}, map=encoded(0, 15))), [])
    with pytest.raises(ValueError, match="the selection of a in layer 3, head 1 is not base64"):
        pack.pack_attention(attention(head(1, {"a": "***"})), [])


def test_figures_that_json_can_not_say_become_none():
    packed = pack.pack_attention(attention(head(1, {}, mass={"a": float("nan")})), [])
    assert packed is not None
    assert packed.index["layers"][0]["heads"][0]["mass"] == {"a": None}


def test_json_in_a_script_can_not_end_the_script():
    value = {"x": "</script><!-- & \u2028 \u2029 \N{SNOWMAN}"}
    text = pack.script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack.script_json(float("nan"))


def test_plotly_is_whole():
    from plotly.offline import get_plotlyjs

    text, version = pack.plotly_script()
    assert inflate(text).decode() == get_plotlyjs()
    assert version[0].isdigit()
