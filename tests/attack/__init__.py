"""An attack on the command line: hostile, damaged and absurd input, kills, and resources that run out.

tests/scripts/attack_long.py is the long form, with a table of what happened in each class; test_attack.py is the short
form, in the suite. docs/reliability.md has the counts.
"""
