"""Where an attack has the statistics of a private batch from, in each BatchNorm layer."""
