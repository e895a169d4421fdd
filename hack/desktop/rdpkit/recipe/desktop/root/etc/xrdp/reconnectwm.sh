#!/bin/sh
# Runs as the user when a client takes the session over.
echo "resumed=$(date -u +%Y-%m-%dT%H:%M:%SZ)" >>"$HOME/.rdv-session"
