package agent

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// notifyInterval is how often the service manager hears, at least, what the agent is at.
const notifyInterval = 5 * time.Second

// notifier speaks to systemd (sd_notify(3)), where that started this process. The zero value says nothing.
type notifier struct {
	socket string
	// watchdog is within what time systemd wants to hear something, or 0.
	watchdog time.Duration
}

// newNotifier takes what systemd left in the environment out of it: no child may speak for the agent.
func newNotifier() notifier {
	n := notifier{socket: os.Getenv("NOTIFY_SOCKET")}
	if pid := os.Getenv("WATCHDOG_PID"); pid == "" || pid == strconv.Itoa(os.Getpid()) {
		if us, err := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64); err == nil && us > 0 {
			n.watchdog = time.Duration(us) * time.Microsecond
		}
	}
	for _, name := range []string{"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"} {
		os.Unsetenv(name)
	}
	return n
}

// send gives systemd one message: lines of KEY=value. What it doesn't take is lost; the next says the same or more.
func (n notifier) send(lines ...string) error {
	if n.socket == "" {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.socket, Net: "unixgram"}) // "@…" is an abstract one
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = conn.Write([]byte(strings.Join(lines, "\n")))
	return err
}

// keepNotifying tells systemd how the agent is until ctx ends. A report is made over the agent's own locks, so that an agent
// that hangs falls silent, and the unit's watchdog has it started again.
func (a *Agent) keepNotifying(ctx context.Context) {
	if a.notify.socket == "" {
		return
	}
	every := notifyInterval
	if w := a.notify.watchdog; w > 0 {
		every = min(every, w/3)
	}
	for {
		// systemd takes a line for each KEY=value.
		status := strings.Join(strings.Fields(a.health().Summary()), " ")
		if err := a.notify.send("STATUS="+status, "WATCHDOG=1"); err != nil {
			a.log.Debug("systemd not told", "error", err)
		}
		if sleep(ctx, every) != nil {
			return
		}
	}
}

// Summary is a line for a person.
func (h Health) Summary() string {
	switch {
	case h.Stopping:
		return fmt.Sprintf("stopping, %d sessions", h.Sessions)
	case !h.Enrolled:
		return "not enrolled yet: " + cmp.Or(h.Problem, "asking the broker")
	case !h.Connected:
		return "no control channel to a broker: " + cmp.Or(h.Problem, "dialling")
	case !h.RDPReady:
		return "connected; the RDP server can't take sessions: " + cmp.Or(h.Message, "not asked yet")
	}
	return fmt.Sprintf("connected and ready, %d sessions", h.Sessions)
}
