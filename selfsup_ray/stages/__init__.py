"""The stages: one file each, one config class and one function; STAGES is their order."""

STAGES = (
    "ingest",
    "dimension",
    "pretext",
    "sela",
    "whiten",
    "patches",
    "classify",
    "embed",
    "maps",
    "reduce",
    "graph",
    "scan",
    "selflabel",
    "diffuse",
    "probe",
    "linear",
    "finetune",
    "lowshot",
    "voc07",
    "evaluate",
    "export",
)
"""Names in the order of the data flow; light to import, so that `--help` can list them."""
