"""Models by expression, and loading what travels."""

from fedsim.models.building import Model, build_model, initial_model, load_arrays, travelling

__all__ = ["Model", "build_model", "initial_model", "load_arrays", "travelling"]
