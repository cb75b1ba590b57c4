"""Which parameters form a block, what role each has, and where their entries stand: in stacks, on ranks.

Knows torch and PEFT's names of parameters, but no projection, no trainer and no option.
"""
