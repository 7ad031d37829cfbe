"""Checkpoints of which only the records are there."""

from pathlib import Path

from hmoe_ds.model.checkpoint_record import LIST_FILE, CheckpointFile, write_list, write_record


def make_up_checkpoint(out: Path, step: int, config: dict, dataset: str = "x", **notes) -> Path:
    """In the run's folder `out`; -> the checkpoint's folder."""
    folder = out / "checkpoints" / f"step{step:08d}"
    folder.mkdir(parents=True)
    state = {"step": step, "plan": {}, "validation_loss": None, "config": config, "dataset": dataset}
    write_record(folder, state | notes)
    list_files(folder)
    (out / "checkpoints" / "latest").write_text(folder.name)
    return folder


def list_files(checkpoint: Path) -> None:
    """Let a checkpoint's list fit its files, as who makes one up would."""
    write_list(checkpoint, [CheckpointFile.of(path) for path in checkpoint.iterdir() if path.name != LIST_FILE])
