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

__all__ = [
    "build_model",
    "initial_model",
    "is_buffer",
    "is_index",
    "load_arrays",
    "save_weights",
    "saved_weights",
    "trained_tensors",
    "travelling",
    "uploaded_names",
]
