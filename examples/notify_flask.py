"""A Flask app that sends notices to the users of the Falcon app, through the broker between them.

    python3 -m pip install ".[nats]" flask
    PACHINKO_BACKPLANE=nats://localhost:4222 flask --app examples/notify_flask run
    curl -d "text=Your parcel is here" http://127.0.0.1:5000/users/Ada/notices

Requests may run in parallel: their threads share one connection to the broker, which is made at the
first request. So ``gunicorn --preload`` may fork before that. Other WSGI frameworks do the same.
"""

from flask import Flask, request

from pachinko import PachinkoError, SyncHub

app = Flask(__name__)
hub = SyncHub()  # the broker that PACHINKO_BACKPLANE names


@app.post("/users/<user>/notices")
def notify(user: str) -> dict[str, bool]:
    hub.send_to_user(user, "notice", {"text": request.form["text"]})
    return {"sent": True}  # The user may not be connected.


@app.errorhandler(PachinkoError)
def broker_is_away(exc: PachinkoError) -> tuple[dict[str, str], int]:
    app.logger.error("nobody was told: %s", exc)
    return {"error": "users cannot be told anything just now; try again"}, 503
