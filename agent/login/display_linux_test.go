package login

import "testing"

func TestCheckListeners(t *testing.T) {
	const path = "/tmp/.X11-unix/X10"
	const titles = "Num       RefCount Protocol Flags    Type St Inode Path\n"
	mine := map[string]bool{"100": true, "101": true}
	for name, c := range map[string]struct {
		table string
		ok    bool
	}{
		"mine":            {"0000000000000000: 00000002 00000000 00010000 0001 01   100 /tmp/.X11-unix/X10\n", true},
		"nobody":          {"", false},
		"another's":       {"0000000000000000: 00000002 00000000 00010000 0001 01   200 /tmp/.X11-unix/X10\n", false},
		"a connection":    {"0000000000000000: 00000003 00000000 00000000 0001 03   100 /tmp/.X11-unix/X10\n", false},
		"another display": {"0000000000000000: 00000002 00000000 00010000 0001 01   100 /tmp/.X11-unix/X100\n", false},
		"the other kind":  {"0000000000000000: 00000002 00000000 00010000 0001 01   100 @/tmp/.X11-unix/X10\n", false},
		"mine and another's": {"0000000000000000: 00000002 00000000 00010000 0001 01   100 /tmp/.X11-unix/X10\n" +
			"0000000000000000: 00000002 00000000 00010000 0001 01   200 /tmp/.X11-unix/X10\n", false},
		"no inode": {"0000000000000000: 00000002 00000000 00010000 0001 01 /tmp/.X11-unix/X10\n", false},
	} {
		if err := checkListeners(titles+c.table, path, mine); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckDisplay(t *testing.T) {
	for _, display := range []string{"", "10", ":", ":x", "other:10", ":10/../11", "unix:10", ":99999999", ":65000"} {
		if CheckDisplay(display) == nil {
			t.Errorf("%q was taken", display)
		}
	}
}
