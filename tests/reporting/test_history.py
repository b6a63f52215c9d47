"""What is there is read; what is half written waits; what is broken is named."""

import pytest

from fedfora.reporting.history import read_lines, read_run


def test_a_half_written_last_line_is_left_out(write_run):
    directory = write_run()
    whole = read_run(directory).events
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"event": "round", "rou')
    assert read_run(directory).events == whole


def test_a_run_may_lack_any_file_but_not_all(write_run, tmp_path):
    directory = write_run()
    for name in ("environment.json", "config.yaml"):
        (directory / name).unlink()
        assert len(read_run(directory).of("round")) == 3
    (directory / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="not a run directory: it holds none of config"):
        read_run(directory)
    with pytest.raises(ValueError, match="no such directory"):
        read_run(tmp_path / "nowhere")


@pytest.mark.parametrize("line", ["{", "[1]", "7"])
def test_a_broken_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"event": "round"}}\n{line}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_lines(path)


def test_a_setting_that_is_not_there_is_none(write_run):
    run = read_run(write_run())
    assert run.setting("model", "quantization") == "nf4"
    assert run.setting("model", "color") is None
    assert run.setting("garden", "color") is None
