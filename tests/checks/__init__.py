"""Take out one check after another, and see whether a test notices: ``make checks``.

The sources are copied to a temporary directory, where each check asks :mod:`checks.switch` what it
is to see; so one process holds all variants, and each is tried in a fork of it. A first run notes
in which tests a check sees what taking it out would change; no other test can notice.
"""
