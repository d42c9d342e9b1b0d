"""Give a policy the normalisation statistics of a data set, where its own are missing or ``--statistics data`` asks."""

from __future__ import annotations

from rlrc.artifact.describe import normalisation_lines
from rlrc.compressor.checkpoints.lerobot import dataset_statistics
from rlrc.compressor.checkpoints.lerobot.normaliser import MODES
from rlrc.compressor.stages.sources import PolicySource
from rlrc.compressor.training.config import SFTOptions
from rlrc.errors import UserError


def adopt_statistics(source: PolicySource, config: SFTOptions) -> list[str]:
    """Replace missing statistics, or all of them, by those of the data set. -> lines that describe the change.

    Raises UserError if statistics are needed and there is no data set, or if the policy has no record to replace.
    """
    spec, record, replace_all = source.spec, source.normalisation, config.statistics == "data"
    absent, own = dataset_statistics.find_missing(record), dataset_statistics.find_normalised(record)
    if replace_all and not own:
        raise UserError(
            f"expected a policy that is normalised as LeRobot does ({', '.join(MODES)}) with --statistics data, found "
            f"{spec.family} without a record of it; leave --statistics out to keep the policy's"
        )
    if (absent or replace_all) and not config.data:
        raise UserError(
            f"expected a data set for the statistics of {', '.join(absent or own)}, found none; give --data FOLDER"
        )
    names = own if replace_all else []
    names += [name for name in dataset_statistics.find_undecided(spec, record) if name not in names]
    if names and config.data:
        dataset = dataset_statistics.open_dataset(config.data)
        source.spec, source.normalisation = dataset_statistics.adopt_statistics(
            spec, record, names, dataset, config.cameras
        )
        dataset.close()
    lines = normalisation_lines({name: how for name, how in source.normalisation.items() if how != record[name]})
    kept = [name for name in own if name not in names]
    if kept and config.data:
        lines.append(
            f"the policy's own statistics of {', '.join(kept)} are kept; --statistics data takes those of {config.data}"
        )
    return lines
