"""Names of a run's phases, as people see them."""

PHASES = {
    "load": "load the model",
    "before": "answers before",
    "reference": "the model before training",
    "train": "training",
    "removal": "remove what is known",
    "token": "learn the unlearning token",
    "statistics": "statistics of ordinary text",
    "values": "values (z)",
    "edit": "solve for the edit",
    "after": "answers after",
    "save": "write the folder",
}
