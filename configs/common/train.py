"""The settings of a run; trainkit/config/defaults.py explains those of the same names."""

train = {
    "output_dir": "./output",
    # Weights that a new run starts from.
    "init_checkpoint": "",
    # Optimizer steps.
    "max_iter": 2000,
    # fp16 with a gradient scaler.
    "amp": {"enabled": False},
    # Arguments of create_ddp_model.
    "ddp": {"broadcast_buffers": False, "find_unused_parameters": False, "fp16_compression": False},
    # Iterations between two checkpoints, and how many of them to keep.
    "checkpointer": {"period": 500, "max_to_keep": 100},
    # Iterations between two evaluations, and the metric whose best model is kept ("": none).
    "eval_period": 500,
    "best_metric": "",
    # Iterations between two lines of log and metrics.
    "log_period": 20,
    # auto, cpu, cuda, cuda:1, mps.
    "device": "auto",
    # Of all that is random; a negative one draws a seed.
    "seed": 0,
}
