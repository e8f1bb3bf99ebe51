"""Models by expression, and loading what travels."""

from fedsim.models.building import (
    build_model,
    initial_model,
    is_buffer,
    is_index,
    load_arrays,
    save_weights,
    saved_weights,
    trained_tensors,
    travelling,
    uploaded_names,
)
from fedsim.models.group_norm import group_normalized, mixing_layers

__all__ = [
    "build_model",
    "group_normalized",
    "initial_model",
    "is_buffer",
    "is_index",
    "load_arrays",
    "mixing_layers",
    "save_weights",
    "saved_weights",
    "trained_tensors",
    "travelling",
    "uploaded_names",
]
