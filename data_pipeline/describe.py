"""What a person wants to know of a dataset first, as text."""

from data_pipeline.manifest import Counts, Manifest, SplitRecord
from data_pipeline.molecules.rejects import rejects_in_words
from data_pipeline.schema import DESCRIPTORS, FINGERPRINT_BINS


def describe(manifest: Manifest) -> str:
    """Sources, counts, rejects by reason and sizes, one fact per line."""
    counts = manifest.counts
    lines = [
        f"source      {source.name}: {source.rows:,} rows{_licence(source.licence)}" for source in manifest.sources
    ]
    lines += [
        f"excluded    molecules of {record.name}: {record.rows:,} rows, {record.rejected:,} of them unreadable"
        for record in manifest.exclusions
    ]
    lines += [f"rows        {describe_counts(counts)}"]
    lines += [f"standard    {counts.standardized:,} molecules were changed by standardisation"]
    lines += [f"rejected    {rejects_in_words({reason: number})}" for reason, number in counts.rejected.items()]
    lines += [f"{name:<12}{_split(split)}" for name, split in manifest.splits.items()]
    if manifest.options["targets"]:
        lines += [f"targets     fingerprint of {FINGERPRINT_BINS} bins, {len(DESCRIPTORS)} descriptors"]
    made_with = ", ".join(f"{library} {version}" for library, version in manifest.versions.items())
    return "\n".join([*lines, f"made with   {made_with}"])


def describe_counts(counts: Counts) -> str:
    """What became of the rows that were read."""
    return (
        f"{counts.read:,} read = {sum(counts.written.values()):,} written"
        f" + {counts.duplicates:,} duplicates + {counts.excluded:,} excluded"
        f" + {sum(counts.rejected.values()):,} rejected"
    )


def _licence(licence: str | None) -> str:
    return f" ({licence})" if licence else ""


def _split(split: SplitRecord) -> str:
    if not split.rows:
        return "no molecules"
    megabytes = sum(shard.bytes for shard in split.shards) / 1e6
    return (
        f"{split.rows:,} molecules, {split.scaffolds:,} scaffolds, {split.acyclic:,} acyclic, "
        f"{split.atoms / split.rows:.1f} atoms each (largest {split.max_atoms}), "
        f"{len(split.shards)} shards, {megabytes:.1f} MB"
    )
