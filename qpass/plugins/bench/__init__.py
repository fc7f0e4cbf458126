"""How fast the kernels are: each beside its floor and beside what else does its work, in one run.

The floor of a call is the time that its bytes take at the rate of a device-to-device copy, or its operations at the
rate of the tensor cores, whichever is longer; both rates are measured in the same run (8 bits: twice the 16-bit rate).
Everything is timed in one way (`timing`): calls are captured into a CUDA graph, one after the other on copies of their
tensors that together exceed the L2 cache, so that neither launches nor a warm cache are measured; small activations
stay in the cache, as they do in a model.
"""
