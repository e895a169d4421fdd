package setup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"
	"time"
)

// Setup changes one machine. Its methods are root's to call, one at a time.
type Setup struct {
	tree    tree
	store   store
	out     io.Writer
	version func(context.Context) (string, error)
	restart func(context.Context) error
	// patience is how long sesman may take to start.
	patience time.Duration
}

// New works on this machine, and keeps the originals in the agent's state folder. What is done is said on out.
func New(stateDir string, out io.Writer) *Setup {
	return &Setup{tree: tree{root: "/"}, store: store{dir: filepath.Join(stateDir, Folder)}, out: out, version: xrdpVersion, restart: restart, patience: 5 * time.Second}
}

func (s *Setup) checkRoot() error {
	if s.tree.root == "/" && os.Geteuid() != 0 {
		return errors.New("this changes files of root's: run it as root")
	}
	return nil
}

func (s *Setup) say(format string, args ...any) { fmt.Fprintf(s.out, format+"\n", args...) }

// Program is this process's, as PAM can run it: an error says why others than root could put another in its place.
func Program() (string, error) {
	p, err := os.Executable()
	if err == nil {
		p, err = filepath.EvalSymlinks(p)
	}
	if err != nil {
		return "", err
	}
	return p, tree{root: "/"}.checkProgram(p)
}

func (t tree) checkProgram(p string) error {
	fi, err := t.checkFile(p)
	if err == nil && fi.Mode().Perm()&0o005 != 0o005 {
		err = refusal("its mode is %04o", fi.Mode().Perm())
	}
	for dir := path.Dir(p); err == nil && dir != "/"; dir = path.Dir(dir) {
		if fi, err = os.Lstat(t.at(dir)); err == nil && fi.Mode().Perm()&0o001 == 0 {
			err = refusal("%s has mode %04o", dir, fi.Mode().Perm())
		}
	}
	if err != nil {
		return fmt.Errorf("PAM is to run %s as root, and each session as its user: %w. Install the agent where only root writes and all may run it, as with `install -o root -m 755 %s /usr/local/sbin/rdv-agent`, and run this from there", p, err, p)
	}
	return nil
}

// work is what an installation comes to.
type work struct {
	options  Options
	manifest *manifest
	group    string
	changes  []change          // planned; before and existed are the plan's base
	current  map[string]change // by path: what is there, in before and existed
	modes    map[string]fs.FileInfo
	dropped  []string // files that were set up and are no longer wanted
}

// plan compares the machine with what it is to be.
func (s *Setup) plan(ctx context.Context, o Options) (*work, error) {
	if err := s.tree.checkProgram(o.Program); err != nil && !(o.ProgramToCome && errors.Is(err, fs.ErrNotExist)) {
		return nil, err
	}
	old, err := s.store.load()
	if err != nil {
		return nil, err
	}
	if old == nil {
		old = &manifest{}
	}
	w := &work{options: o, manifest: old, current: map[string]change{}, modes: map[string]fs.FileInfo{}}
	m, err := s.gather(ctx, o, func(p, text string, exists bool) (string, bool, error) {
		w.current[p] = change{path: p, before: text, existed: exists}
		return s.base(old.entry(p), p, text, exists)
	})
	if err != nil {
		return nil, err
	}
	if w.changes, err = plan(m, o); err != nil {
		return nil, err
	}
	w.group = m.group
	for _, e := range old.Files {
		if !slices.ContainsFunc(w.changes, func(c change) bool { return c.path == e.Path }) {
			w.dropped = append(w.dropped, e.Path)
		}
	}
	return w, nil
}

// base is the text that a plan begins with: the machine's own, and never ours.
func (s *Setup) base(e *entry, p, text string, exists bool) (string, bool, error) {
	if e == nil {
		if marked(text) {
			return "", false, refusal("%s was changed by an agent whose state folder is not %s: give that --state-dir, or restore the file (on Debian: rm it, then apt-get install --reinstall -o Dpkg::Options::=--force-confmiss xrdp)", p, path.Dir(s.store.dir))
		}
		return text, exists, nil
	}
	switch e.stateOf(text, exists) {
	case asSetUp:
		before, err := s.store.original(e)
		return before, e.Original != "", err
	case foreign:
		if e.Original == "" {
			return "", false, refusal("%s was changed after it was set up: move your lines into another file, remove this one and run this again", p)
		}
	}
	return text, exists, nil // edited after us, or replaced, as by an upgrade
}

// pending are the changes that have yet to be made.
func (w *work) pending() (all []change) {
	for _, c := range w.changes {
		now := w.current[c.path]
		if !now.existed || now.before != c.after {
			all = append(all, change{path: c.path, existed: now.existed, before: now.before, after: c.after, program: c.program})
		}
	}
	return all
}

// Plan shows what Install would change, and says whether that is anything.
func (s *Setup) Plan(ctx context.Context, o Options) (changes bool, err error) {
	w, err := s.plan(ctx, o)
	if err != nil {
		return false, err
	}
	return s.show(w), nil
}

func (s *Setup) show(w *work) (any bool) {
	defer func() {
		if any {
			s.warn()
		}
	}()
	for _, c := range w.pending() {
		showDiff(s.out, c)
		any = true
	}
	for _, p := range w.dropped {
		s.say("--- %s: restored", p)
		any = true
	}
	if err := s.tree.checkRuntime(w.group); err != nil {
		s.say("--- %s (mode 0750, root and group %s alone) and the link %s to its socket", socketDir, w.group, socketLink)
		any = true
	}
	return any
}

// warn says what restarting xrdp does to those who work.
func (s *Setup) warn() {
	n := s.tree.desktops()
	if n == 0 || !s.tree.systemd() {
		return
	}
	what := fmt.Sprintf("%d desktops run", n)
	if n == 1 {
		what = "1 desktop runs"
	}
	s.say("%s on this machine. Restarting xrdp cuts their users off: the programs go on, but nobody gets back to them (`loginctl terminate-user NAME` ends them)", what)
}

// Install sets the machine up. Done twice, it changes nothing the second time; after a crash it goes on.
func (s *Setup) Install(ctx context.Context, o Options) error {
	if err := s.checkRoot(); err != nil {
		return err
	}
	w, err := s.plan(ctx, o)
	if err != nil {
		return err
	}
	changed := s.show(w)
	m := w.manifest
	if !changed && !m.Pending && m.Options == o {
		s.say("login by connection is set up; nothing to change")
		return nil
	}
	if err := s.record(w, changed); err != nil {
		return err
	}
	for _, dir := range m.Folders {
		if err := os.Mkdir(s.tree.at(dir), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	for _, c := range w.pending() {
		e := m.entry(c.path)
		if err := s.tree.write(c.path, c.after, e.Mode, e.UID, e.GID); err != nil {
			return err
		}
	}
	for _, p := range w.dropped {
		if _, err := s.restore(m.entry(p)); err != nil {
			return err
		}
	}
	if err := s.tree.makeRuntime(w.group); err != nil {
		return err
	}
	m.Files = slices.DeleteFunc(m.Files, func(e entry) bool { return slices.Contains(w.dropped, e.Path) })
	if err := s.apply(ctx, m); err != nil {
		return err
	}
	// The sesman that has just stopped removed what it took for its socket.
	if err := s.tree.makeRuntime(w.group); err != nil {
		return err
	}
	if s.await(ctx) != nil {
		s.say("xrdp-sesman does not run: start it, and xrdp")
	}
	s.say("login by connection is set up; the originals are in %s", s.store.dir)
	return nil
}

// await returns when sesman has made its socket. systemd takes it for started before that.
func (s *Setup) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.patience)
	defer cancel()
	for !s.tree.exists(socketPath) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
	return nil
}

// record keeps the originals and writes down what is about to be done, before it is.
func (s *Setup) record(w *work, changed bool) error {
	m := w.manifest
	m.Options = w.options
	m.Pending = m.Pending || changed
	for _, c := range w.changes {
		now := w.current[c.path]
		e := m.entry(c.path)
		switch {
		case e == nil:
			m.Files = append(m.Files, entry{Path: c.path})
			e = &m.Files[len(m.Files)-1]
			fallthrough
		case e.stateOf(now.before, now.existed) == foreign && !marked(now.before):
			mode := fs.FileMode(0o644)
			if c.program {
				mode = 0o755
			}
			*e = entry{Path: c.path, Mode: mode, UID: int(s.tree.owner), GID: int(s.tree.owner)}
			if now.existed {
				name, err := s.store.keep(c.path, now.before)
				if err != nil {
					return err
				}
				fi, err := os.Lstat(s.tree.at(c.path))
				if err != nil {
					return err
				}
				sys := fi.Sys().(*syscall.Stat_t)
				e.Original, e.OriginalSum, e.Mode, e.UID, e.GID = name, sum(now.before), fi.Mode().Perm(), int(sys.Uid), int(sys.Gid)
			}
		case e.stateOf(now.before, now.existed) == foreign && now.before == c.after:
			continue // somebody's change that does no harm: it is not ours to undo
		case e.stateOf(now.before, now.existed) == foreign:
			e.Edited = !slices.Contains(e.Written, sum(c.after))
		}
		if ours := sum(c.after); len(e.Written) == 0 || e.Written[len(e.Written)-1] != ours {
			e.Written = append(slices.DeleteFunc(e.Written, func(old string) bool { return old == ours }), ours)
		}
		for _, dir := range s.tree.missingFolders(c.path) {
			if !slices.Contains(m.Folders, dir) {
				m.Folders = append(m.Folders, dir)
			}
		}
	}
	return s.store.save(m)
}

// apply has xrdp take its files over, where they were changed.
func (s *Setup) apply(ctx context.Context, m *manifest) error {
	if m.Pending {
		if !s.tree.systemd() {
			s.say("systemd doesn't run here: stop xrdp and xrdp-sesman, run this again, then start them")
		} else if err := s.restart(ctx); err != nil {
			return fmt.Errorf("the files are written, and xrdp has yet to take them over: %w", err)
		} else {
			s.say("restarted xrdp-sesman and xrdp")
		}
		m.Pending = false
	}
	return s.store.save(m)
}

// restore gives a file back as it was, or says why not.
func (s *Setup) restore(e *entry) (left string, err error) {
	text, fi, err := s.tree.read(e.Path)
	if err != nil {
		return "", err
	}
	copied := filepath.Join(s.store.dir, e.Original)
	if e.Original == "" {
		copied = "/dev/null"
	}
	switch st := e.stateOf(text, fi != nil); {
	case st == original, st == foreign && !marked(text):
		return "", nil
	case st == gone:
		return fmt.Sprintf("%s was removed since; its original is %s", e.Path, copied), nil
	case st == foreign, e.Edited:
		return fmt.Sprintf("%s was changed since, and is left as it is: compare it with the original (diff %s %s), take out what the agent put there, its mark too, and run this again", e.Path, copied, e.Path), nil
	case e.Original == "":
		return "", s.tree.remove(e.Path)
	}
	before, err := s.store.original(e)
	if err != nil {
		return "", err
	}
	if err := s.tree.write(e.Path, before, e.Mode, e.UID, e.GID); err != nil {
		return "", err
	}
	s.say("restored %s", e.Path)
	return "", nil
}

// Uninstall takes everything back, but for files that somebody changed since: it leaves these, and its error says so.
func (s *Setup) Uninstall(ctx context.Context) error {
	if err := s.checkRoot(); err != nil {
		return err
	}
	m, err := s.store.load()
	if err != nil {
		return err
	}
	if m == nil {
		s.say("login by connection is not set up; nothing to undo")
		return nil
	}
	s.warn()
	m.Pending = true
	if err := s.store.save(m); err != nil {
		return err
	}
	var left []entry
	var whys []error
	for _, e := range slices.Backward(m.Files) { // PAM's last
		why, err := s.restore(&e)
		if err != nil {
			return err
		}
		if why != "" {
			left = append(left, e)
			whys = append(whys, errors.New(why))
		}
	}
	slices.Reverse(left)
	if err := s.tree.removeLink(); err != nil {
		return err
	}
	for _, dir := range slices.Backward(m.Folders) {
		os.Remove(s.tree.at(dir)) // unless something else is in it by now
	}
	m.Files = left
	if err := s.apply(ctx, m); err != nil {
		return err
	}
	s.tree.removeSocketDir()
	if len(left) > 0 {
		return errors.Join(whys...)
	}
	if err := s.store.remove(); err != nil {
		return err
	}
	s.say("login by connection is taken back: the machine's files are as they were")
	return nil
}

// Installed gives what was set up; ok is false where nothing is.
func (s *Setup) Installed() (o Options, ok bool, err error) {
	m, err := s.store.load()
	if m == nil || err != nil {
		return o, false, err
	}
	return m.Options, true, nil
}

// Status says whether the machine is as it was set up, and what deviates.
func (s *Setup) Status(ctx context.Context) error {
	m, err := s.store.load()
	if err != nil {
		return err
	}
	if m == nil {
		return errors.New("login by connection is not set up on this machine: `agent login install` does it")
	}
	s.say("login by %s, asking %s with --login-dir=%s", m.Options.Mode, m.Options.Program, m.Options.LoginDir)
	var problems []error
	for i := range m.Files {
		e := &m.Files[i]
		text, fi, err := s.tree.read(e.Path)
		switch {
		case err != nil:
			problems = append(problems, err)
			continue
		case fi == nil:
			problems = append(problems, fmt.Errorf("%s is missing", e.Path))
			continue
		case sum(text) == e.Written[len(e.Written)-1]:
			s.say("%s: as set up", e.Path)
			continue
		}
		s.say("%s: changed since", e.Path)
	}
	w, err := s.plan(ctx, m.Options)
	if err != nil {
		problems = append(problems, err)
	} else {
		for _, c := range w.pending() {
			showDiff(s.out, c)
			problems = append(problems, fmt.Errorf("%s is not as login by connection needs it", c.path))
		}
	}
	if m.Pending {
		problems = append(problems, errors.New("xrdp was not restarted after the last change"))
	}
	if err := s.tree.check(m.Options.LoginDir); err != nil {
		problems = append(problems, err)
	}
	if len(problems) > 0 {
		return fmt.Errorf("%w\n`agent login install` sets it up again", errors.Join(problems...))
	}
	s.say("everything is as set up")
	return nil
}
