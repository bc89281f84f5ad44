"""The model on its device: the protocol that the scheduler drives, and the choice of the device."""
