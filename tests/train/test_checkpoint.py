"""State on disk: what was saved comes back; anything else is refused without running its code."""

import pickle

import pytest
import torch

from netsmith.errors import UserError
from netsmith.train.checkpoint import load_state, save_state


def test_round_trip(tmp_path):
    path = tmp_path / "new" / "state.pt"
    state = {"w": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last), "n": 3, "names": ["a"], "none": None}
    save_state(path, state)
    loaded = load_state(path)
    assert loaded["w"].equal(state["w"])
    assert loaded["w"].stride() == state["w"].stride()
    assert {key: loaded[key] for key in ("n", "names", "none")} == {"n": 3, "names": ["a"], "none": None}
    save_state(path, {"n": 4})
    assert load_state(path) == {"n": 4}
    assert [file.name for file in path.parent.iterdir()] == ["state.pt"]


class Evil:
    def __reduce__(self):
        return print, ("this must not be printed",)


def test_what_is_no_checkpoint_is_refused(tmp_path, capsys):
    path = tmp_path / "state.pt"
    save_state(path, {"w": torch.randn(1000)})
    whole = path.read_bytes()
    for content in (b"", b"nonsense", whole[:-100], whole[: len(whole) // 2], pickle.dumps(Evil())):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"state\.pt is not a checkpoint that can be read .*delete it") as caught:
            load_state(path)
        assert "\n" not in str(caught.value)
    torch.save(Evil(), path)
    with pytest.raises(UserError, match="is not a checkpoint"):
        load_state(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="is not a checkpoint of netsmith"):
        load_state(path)
    with pytest.raises(UserError, match="is not a checkpoint that can be read"):
        load_state(tmp_path / "nowhere.pt")
    assert capsys.readouterr().out == ""
