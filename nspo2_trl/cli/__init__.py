"""What people type: the command `nspo2` (train, measure, retain, report, env), and what it reads, checks and draws.

May import everything; nothing imports it.
"""
