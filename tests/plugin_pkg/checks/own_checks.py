"""What the author of a plugin writes: the contract in a few lines for each strategy, and a test of an idea itself."""

import prunekit
from prunekit.cli.main import main
from prunekit.testing import StrategyContract, tiny_inputs, tiny_llava


class TestCorner(StrategyContract):
    use = "corner"
    options = {"corner": "bottom-right"}


class TestSandwich(StrategyContract):
    use = "sandwich"


class TestByLength(StrategyContract):
    use = "by_length"


class TestBlend(StrategyContract):
    use = "blend"


def test_it_keeps_the_corner():
    model = tiny_llava()
    with prunekit.apply(model, {"name": "corner", "stages": [{"use": "corner", "keep_tokens": 3}]}) as run:
        model(**tiny_inputs())
    assert run.report.events[0].kept == ((0, 1, 4),)


def test_the_command_line_runs_it(tiny_checkpoint, tmp_path, capsys):
    """On a complete tiny model, by the fixture of prunekit's pytest plugin."""
    from PIL import Image

    Image.new("RGB", (20, 14), "red").save(tmp_path / "red.png")
    (tmp_path / "blend.yaml").write_text("name: blend\nstages: [{use: blend, keep: 0.5}]\n")
    words = ["--image", str(tmp_path / "red.png"), "--prompt", "w40 w41", "--max-new-tokens", "2"]
    assert main(["run", str(tmp_path / "blend.yaml"), "--model", str(tiny_checkpoint), *words]) == 0
    assert "blend at vision.0: visual tokens 16 -> 8" in capsys.readouterr().out
