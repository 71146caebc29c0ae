"""The columns of a run's tables: who reads a run folder needs no torch."""

MORE_SCORES = ("eval_exact_match", "eval_rouge_l", "eval_choice_accuracy")  # empty where they aren't measured
METRICS = (
    "round",
    "eval_loss",
    "eval_accuracy",
    "train_loss",
    "seconds",
    "eval_seconds",
    "clients",
    "failed",
    "up_payload_bytes",
    "down_payload_bytes",
    "up_wire_bytes",
    "down_wire_bytes",
    "overhead_bytes",
    "client_eval_loss",
    "client_eval_accuracy",
    "aggregation_error",  # ||dW_server - dW*||_F / ||dW*||_F
    "merge_error",  # of the residual's recompression, relative; 0 where nothing was cut
    "virtual_seconds",  # the virtual clock when the round ended, where devices have limits
    "requantization_error",  # of the whole change of the base, relative; empty where it is kept beside the base
    *MORE_SCORES,
)
FAILURES = ("round", "client", "error")
CLIENTS = ("round", "client", "eval_loss", "eval_accuracy", "tokens", *MORE_SCORES, "name")
CLOCK = (
    "round", "client", "begun_seconds", "device", "down_bytes", "download_seconds", "compute_seconds", "up_bytes",
    "upload_seconds", "memory_bytes", "limit_bytes", "bits", "batch_size", "steps", "layers", "trainable_params",
    "staleness", "excluded_reason",
)  # fmt: skip
SIMILARITY = ("round", "client", "other", "similarity")
