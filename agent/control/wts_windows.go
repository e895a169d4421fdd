package control

import (
	"context"
	"fmt"
	"unsafe"

	"golang.org/x/sys/windows"
)

// WTS acts on this machine's Remote Desktop sessions by the WTS API; Desktop.Display is a session's id. It has been
// compiled, and never been run on a real Windows.
type WTS struct{}

var (
	wtsapi                      = windows.NewLazySystemDLL("wtsapi32.dll")
	wtsQuerySessionInfo         = wtsapi.NewProc("WTSQuerySessionInformationW")
	wtsSendMessage              = wtsapi.NewProc("WTSSendMessageW")
	wtsLogoffSession            = wtsapi.NewProc("WTSLogoffSession")
	currentServer       uintptr = 0 // WTS_CURRENT_SERVER_HANDLE
)

// Of WTS_INFO_CLASS.
const (
	wtsUserName           = 5
	wtsClientAddress      = 14
	wtsClientProtocolType = 16
	protocolRDP           = 2
	// styleOK is MB_OK | MB_ICONINFORMATION | MB_SETFOREGROUND | MB_TOPMOST.
	styleOK = 0x40 | 0x10000 | 0x40000
)

// query asks one thing of a session, and gives a copy of the answer.
func query(id uint32, class uintptr) ([]byte, error) {
	var buffer unsafe.Pointer
	var length uint32
	ok, _, err := wtsQuerySessionInfo.Call(currentServer, uintptr(id), class, uintptr(unsafe.Pointer(&buffer)), uintptr(unsafe.Pointer(&length)))
	if ok == 0 {
		return nil, fmt.Errorf("WTSQuerySessionInformation of session %d: %w", id, err)
	}
	defer windows.WTSFreeMemory(uintptr(buffer))
	return append([]byte(nil), unsafe.Slice((*byte)(buffer), length)...), nil
}

// terminals lists the sessions. One that ends meanwhile is left out.
func terminals() ([]terminal, error) {
	var first *windows.WTS_SESSION_INFO
	var count uint32
	if err := windows.WTSEnumerateSessions(0, 0, 1, &first, &count); err != nil {
		return nil, fmt.Errorf("WTSEnumerateSessions: %w", err)
	}
	defer windows.WTSFreeMemory(uintptr(unsafe.Pointer(first)))
	var all []terminal
	for _, s := range unsafe.Slice(first, count) {
		t := terminal{id: s.SessionID, state: s.State}
		if data, err := query(s.SessionID, wtsUserName); err == nil && len(data) >= 2 {
			t.user = windows.UTF16ToString(unsafe.Slice((*uint16)(unsafe.Pointer(&data[0])), len(data)/2))
		}
		if data, err := query(s.SessionID, wtsClientProtocolType); err == nil && len(data) >= 2 {
			t.rdp = data[0] == protocolRDP && data[1] == 0
		}
		if data, err := query(s.SessionID, wtsClientAddress); err == nil && len(data) >= 24 { // DWORD AddressFamily, BYTE Address[20]
			t.client = parseClientAddress(*(*uint32)(unsafe.Pointer(&data[0])), [20]byte(data[4:24]))
		}
		all = append(all, t)
	}
	return all, nil
}

// OnlyDesktop is the one that a client on this machine is connected to.
func (WTS) OnlyDesktop(context.Context) (Desktop, error) {
	all, err := terminals()
	if err != nil {
		return Desktop{}, err
	}
	t, err := onlyTerminal(all)
	return Desktop{Display: int(t.id)}, err
}

// LogOff implements Control. It waits until the session has ended.
func (WTS) LogOff(_ context.Context, d Desktop) error {
	if ok, _, err := wtsLogoffSession.Call(currentServer, uintptr(d.Display), 1); ok == 0 {
		return fmt.Errorf("WTSLogoffSession %d: %w: the agent must run as LocalSystem or an administrator", d.Display, err)
	}
	return nil
}

// Message implements Control.
func (WTS) Message(_ context.Context, d Desktop, text string) error {
	head, err := windows.UTF16FromString(title)
	if err != nil {
		return err
	}
	body, err := windows.UTF16FromString(text)
	if err != nil {
		return err
	}
	var response uint32
	ok, _, err := wtsSendMessage.Call(currentServer, uintptr(d.Display), uintptr(unsafe.Pointer(&head[0])), uintptr(2*(len(head)-1)),
		uintptr(unsafe.Pointer(&body[0])), uintptr(2*(len(body)-1)), styleOK, 0, uintptr(unsafe.Pointer(&response)), 0)
	if ok == 0 {
		return fmt.Errorf("WTSSendMessage to session %d: %w: the agent must run as LocalSystem or an administrator", d.Display, err)
	}
	return nil
}
