"""Where a source comes from and on what terms, as far as its name tells: the licence notes of the manifest."""

import os
import re

from data_pipeline.remote import is_url
from data_pipeline.sources.synth import is_synth

_NCI5K = "5,000 NCI molecules shipped with RDKit (BSD-3-Clause)"
_SYNTHETIC = "enumerated by hmoe_ds, from no collection; no terms"

# Collections by what files of theirs are called, and their owners' terms in short.
_COLLECTIONS = {
    "zinc": "ZINC: free to use; redistribution of large parts needs permission of the Irwin and Shoichet laboratories",
    r"pubchem|cid-smiles|compound_\d+_\d+\.sdf": "PubChem: public domain; depositors may have terms of their own",
    "chembl": "ChEMBL: CC BY-SA 3.0",
    "enamine": "Enamine: under Enamine's terms of use, no redistribution",
    "gdb": "GDB: Reymond group, University of Bern; free to use, cite the authors",
    r"moleculenet|(?:bace|bbbp|clintox|delaney|esol|freesolv|hiv|lipo(?:philicity)?|muv|sider|tox21|toxcast)\b": (
        "MoleculeNet: a collection of public data, each part under its owner's terms"
    ),
}


def licence_note(name: str, path: str) -> str | None:
    """The terms of a source that is called `name` and lies at `path`; None when the name says nothing.

    A collection is recognised where a word of the name begins with it, so the note says that it is assumed. Of a path
    on this machine only the file's name counts: manifests must not tell machines apart. Of a URL everything counts.
    """
    if name == "nci5k":
        return _NCI5K
    if is_synth(name):
        return _SYNTHETIC
    clue = path if is_url(path) else os.path.basename(path)
    notes = [
        note for pattern, note in _COLLECTIONS.items() if re.search(rf"(?<![a-z])(?:{pattern})", clue, re.IGNORECASE)
    ]
    return f"{'; '.join(notes)} (assumed from the file name)" if notes else None
