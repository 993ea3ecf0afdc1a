import os, time
from pathlib import Path
from fedtune.client.trainer import Trainer, TrainerSettings
from fedtune.workflows.setup import data_free_frame, make_bundle, open_setup
from fedtune.wire import encode
def rss(pid):
    return [l for l in Path(f"/proc/{pid}/status").read_text().splitlines() if l.startswith(("VmRSS","VmHWM"))]
def test_it(tiny_job, tiny_csv, tmp_path):
    s=open_setup(tiny_job("data.id=id")); m=s.fresh_model()
    b=make_bundle(s, tmp_path/"b", data_free_frame(s,m), m, {})
    with Trainer(TrainerSettings(b.folder,tiny_csv,None,1,0.0,tmp_path/"log",tmp_path)) as t:
        t0=time.monotonic(); t.open(300); print("open", time.monotonic()-t0, rss(t.pid))
        p=encode("model", b.manifest.spec.schema, b.initial, round=1, frame=b.frame_digest)
        t0=time.monotonic(); t.handle(p,"a",300); print("handle", time.monotonic()-t0, rss(t.pid))
        t0=time.monotonic()
        for _ in range(20): t.open(10)
        print("round trip ms", (time.monotonic()-t0)*50)
