"""Causes that lie before what a check tests. ``findings`` has a next step for each."""

#: A scoring function takes nothing at all.
NOTHING = "no problem was accepted, not even the plainest"

#: The scores are wrong before the check tests anything.
INACCURATE = "scores of ordinary keys are not within class B"

#: The same for keep sets of a tiny live model.
RANKED = "the keys of a plain model are ranked wrongly with the recommended setting"

#: Heads that should have keep sets of their own have the same.
ONE_FOR_ALL = "one keep set serves all KV heads"
