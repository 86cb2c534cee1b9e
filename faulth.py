import faulthandler,sys; faulthandler.dump_traceback_later(25,exit=True)
exec(open('/tmp/lp/r1/run.py').read())
