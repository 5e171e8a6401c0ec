"""The lowest step: ranks, events, files, logs, randomness, registries. Imports nothing of ours."""
