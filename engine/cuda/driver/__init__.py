"""CUDA itself: compiling, launching, staging host data, captured graphs, errors."""
