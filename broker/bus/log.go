package bus

import (
	"fmt"
	"log/slog"
	"strings"
)

// logger hands the server's log lines to slog. The text is the server's own and varies, so it is a value. Rename puts
// clients' addresses into it in place of those that the server sees.
type logger struct {
	log    *slog.Logger
	rename func(string) string
}

func (l logger) text(format string, v []any) string { return l.rename(fmt.Sprintf(format, v...)) }

func (l logger) Noticef(format string, v ...any) {
	l.log.Debug("bus server", "detail", l.text(format, v))
}

func (l logger) Warnf(format string, v ...any) {
	// The server warns that routes skip Go's default verification. routeTLS does its own, of role and workspace too.
	if strings.Contains(format, "hostname of solicited routes will not be verified") {
		return
	}
	l.log.Warn("bus server", "detail", l.text(format, v))
}

// Fatalf reports what the server can't start for. Start sees it by the server not becoming ready.
func (l logger) Fatalf(format string, v ...any) {
	l.log.Error("bus server", "error", l.text(format, v))
}
func (l logger) Errorf(format string, v ...any) {
	l.log.Warn("bus server", "error", l.text(format, v))
}
func (l logger) Debugf(format string, v ...any) {}
func (l logger) Tracef(format string, v ...any) {}
