"""What the phases of a run are called where a person sees them."""

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
