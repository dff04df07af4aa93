# SPDX-License-Identifier: Apache-2.0
"""A page of asv's site in headless Chromium.

The site takes jQuery, Flot and others from the net.  Here they come from npm, in the same versions but for one plugin
that sorts tables: a page says what it shows, not whether the net is up.
"""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What index.html names, the package and the file in it.
SCRIPTS = {
    "jquery-3.3.1.min.js": ("jquery@3.3.1", "jquery/dist/jquery.min.js"),
    "jquery.flot.min.js": ("flot@0.8.3", "flot/jquery.flot.js"),
    "jquery.flot.time.min.js": ("flot@0.8.3", "flot/jquery.flot.time.js"),
    "jquery.flot.selection.min.js": ("flot@0.8.3", "flot/jquery.flot.selection.js"),
    "jquery.flot.categories.min.js": ("flot@0.8.3", "flot/jquery.flot.categories.js"),
    "jquery.flot.orderBars.js": ("flot-orderbars@1.0.0", "flot-orderbars/js/jquery.flot.orderBars.js"),
    "stupidtable.min.js": ("stupid-table-plugin@1.1.3", "stupid-table-plugin/stupidtable.min.js"),
    "md5.min.js": ("blueimp-md5@2.19.0", "blueimp-md5/js/md5.min.js"),
    "bootstrap.min.js": ("bootstrap@3.1.1", "bootstrap/dist/js/bootstrap.min.js"),
    "bootstrap.min.css": ("bootstrap@3.1.1", "bootstrap/dist/css/bootstrap.min.css"),
}

# The grid is grey and the background white: a pixel of the plot that has a colour belongs to a line.
COUNT_COLOURED = """
<script>
setInterval(function () {
  const canvas = document.querySelector("#main-graph canvas.flot-base");
  if (!canvas || !canvas.width) return;
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let coloured = 0;
  for (let i = 0; i < pixels.length; i += 4) {
    const [red, green, blue, alpha] = pixels.slice(i, i + 4);
    if (alpha > 128 && Math.max(red, green, blue) - Math.min(red, green, blue) > 60) coloured += 1;
  }
  document.body.dataset.coloured = coloured;
}, 250);
</script>
"""


def find_chromium() -> str | None:
    """The browser's command."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def localise(site: Path) -> None:
    """Let the site take its scripts from its own folder, and count what its graph shows.

    Raises
    ------
    ValueError
        asv's page wants a script that is not known here.
    """
    with tempfile.TemporaryDirectory() as folder:
        packages = sorted({package for package, _ in SCRIPTS.values()})
        options = ["--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", folder]
        subprocess.run(["npm", "install", *options, *packages], check=True, stdout=subprocess.DEVNULL)
        for name, (_, file) in SCRIPTS.items():
            shutil.copy(Path(folder) / "node_modules" / file, site / name)
    page = site / "index.html"
    text = re.sub(r'(src|href)="https://[^"]*/([^"/]+\.(?:js|css))" integrity="[^"]*"', r'\1="\2"', page.read_text())
    for name in re.findall(r'(?:<script[^>]* src|<link href)="([^"]+)"', text):
        if not (site / name).is_file():
            raise ValueError(f"asv's page wants {name}, which is neither in the site nor in SCRIPTS")
    page.write_text(text.replace("</body>", COUNT_COLOURED + "</body>"))


@contextmanager
def serve(site: Path) -> Iterator[str]:
    """The address at which the site is served meanwhile, on this machine alone."""
    handler = functools.partial(_QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def load(chromium: str, url: str, *arguments: str) -> str:
    """The page's elements once its scripts have run."""
    switches = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    switches += " --disable-component-update --disable-sync --window-size=1280,900 --virtual-time-budget=20000"
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium, *switches.split(), f"--user-data-dir={profile}", *arguments, "--dump-dom", url]
        done = subprocess.run(command, check=True, text=True, capture_output=True, timeout=120)
    return done.stdout


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass
