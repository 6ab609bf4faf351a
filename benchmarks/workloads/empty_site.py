"""`overhead` in script form: what a site runs."""

import hanse.client as flare

flare.init()
while flare.is_running():
    model = flare.receive()
    flare.send(flare.FLModel(params=model.params))
