"""What Python's fork server imports first when it is started anew (`children.install`)."""

import setproctitle

from tests.warm.children import become_the_server

become_the_server()
setproctitle.getproctitle()  # finds the place of the title while the environment is still where it was
