"""What people type: the command `nspo2` with train, report and env, and what these read, check and draw.

May import everything; nothing imports it.
"""
