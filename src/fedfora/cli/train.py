"""fedfora train: fine-tune one FoRA adapter on one device or, under a launcher, on many.

fedfora train --model_name_or_path MODEL --train_file rows.json --output_dir out/adapter
torchrun --nproc_per_node 2 -m fedfora train ...
accelerate launch -m fedfora train ...
deepspeed --module fedfora train ... --deepspeed configs/deepspeed_zero2.json
"""

import os
from collections.abc import Sequence

from fedfora.cli.console import announce, silence_libraries
from fedfora.config import ConfigParser
from fedfora.registry import counted
from fedfora.training.preflight import preflight
from fedfora.training.settings import NO_EFFECT, SECTIONS, TrainSettings


def run(argv: Sequence[str]) -> None:
    """Parse, train, and say where the results are."""
    parser = ConfigParser(SECTIONS.values(), description=__doc__, without=NO_EFFECT)
    settings = TrainSettings(*parser.parse(argv))
    silence_libraries()
    rows = preflight(settings)
    is_first = os.environ.get("RANK", "0") == "0"  # launchers start many processes; one prints
    if is_first:
        data, model = settings.data, settings.model
        announce(
            f"{counted(len(rows.examples), 'row')} of {data.train_file or data.dataset} for "
            f"{model.model_name_or_path} ({model.quantization}), to {settings.run.output_dir}"
        )
    from fedfora.reporting.view import View, clock
    from fedfora.training.run import train

    with View(1) as view:
        result = train(settings, view, rows)
    if not is_first:
        return
    directory = settings.run.output_dir
    print(f"mean loss {result.loss:.3f}, {result.tokens:,} tokens in {clock(result.seconds)}")
    print(f"adapter: {directory}   report: {directory}/report.html")
    print(f"try it: fedfora chat --adapter {directory}")
    print(f"measure it: fedfora predict --model_dir {directory} --test_file TEST.json")
