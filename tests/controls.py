"""Objectives that ask what it is that helps: what `ld` adds, and what `fwm` adds to it.

    python tests/study.py --with tests/controls.py --objective ld,ld_other_clip,ld_deep
"""
from objectives import DEEP, HARD, HEADS, OBJECTIVES, TERMS, Objective, Term, latent_dynamics


def other_clips_dynamics(outputs, head):
    """mean |d(Z) - (H'+ - H')| over pairs, H' the targets of another clip of the batch.

    The same head and the same kind of targets as `ld`, but nothing in Z tells what they are. If it
    helps as `ld` does, then not because features follow the dynamics, but because a second loss
    keeps them alive.
    """
    return latent_dynamics(outputs._replace(h=outputs.h.roll(1, 0)), head)


TERMS["ld_other_clip"] = other_clips_dynamics
HEADS["ld_other_clip"] = HEADS["ld"]
OBJECTIVES.update({
    "ld_other_clip": Objective("both", "ld with the targets of another clip",
                               {"ld_other_clip": Term(1.0)}),
    # With `fwm`, the head of `ld` sees the deep levels alone. Here it does so without `fwm`.
    "ld_deep": Objective("both", "fwm_ld without fwm", {"ld": Term(1.0, DEEP)}),
    "hw_ld_deep": Objective("both", "fwm_hw_ld without fwm",
                            {"hw": Term(1.0), "ld": Term(1.0, {**DEEP, **HARD})}),
})
