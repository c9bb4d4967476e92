"""The stages: one file each, one config class and one function; STAGES is their order."""

STAGES = (
    "ingest",
    "dimension",
    "pretext",
    "whiten",
    "patches",
    "classify",
    "embed",
    "reduce",
    "graph",
    "scan",
    "selflabel",
    "diffuse",
    "probe",
    "linear",
    "finetune",
    "lowshot",
    "evaluate",
    "export",
)
"""Names in the order of the data flow; light to import, so that `--help` can list them."""
