"""What a pod would need: the train step of a config, compiled for a TPU topology without one."""
