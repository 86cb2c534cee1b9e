"""Floor 4: a checked `Run` in, a run folder out."""

from lowprec.train.loop import train
from lowprec.train.session import Session, check, laid_out, open_session, plan_model
from lowprec.train.signals import DIVERGED, REQUEUE, Stop

__all__ = ["DIVERGED", "REQUEUE", "Session", "Stop", "check", "laid_out", "open_session", "plan_model", "train"]
